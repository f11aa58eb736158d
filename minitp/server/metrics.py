"""The metrics of the server, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
GAUGES = {
    "running": ("minitp_sequences_running", "Sequences that are running"),
    "waiting": ("minitp_sequences_waiting", "Sequences that are waiting"),
    "blocks_in_use": ("minitp_cache_blocks_in_use", "Blocks of the KV cache in use"),
}
COUNTERS = {
    "preempted": (
        "minitp_preemptions",
        "Sequences preempted for lack of blocks, since the ranks started",
    ),
    "reused_tokens": (
        "minitp_prefix_tokens_reused",
        "Prompt tokens found in the prefix cache, since the ranks started",
    ),
}
RANK_COUNTERS = {
    "comm_seconds": (
        "minitp_rank_collective_seconds",
        "Time of each rank in collectives of arrays, waiting included, since it started",
    ),
    "busy_seconds": ("minitp_rank_busy_seconds", "Time of each rank in batches, since it started"),
}


REPLICA_GAUGES = {
    "ready": ("minitp_replica_ready", "1 if the replica accepts requests"),
    "waiting_tokens": ("minitp_replica_waiting_tokens", "Tokens that its requests still have to compute"),
    "running": ("minitp_replica_sequences_running", "Sequences that are running on the replica"),
    "waiting": ("minitp_replica_sequences_waiting", "Sequences that are waiting on the replica"),
    "blocks_in_use": ("minitp_replica_cache_blocks_in_use", "Blocks of the replica's KV cache in use"),
}


class Metrics:
    """A registry with counts and times of requests; the load is read when the metrics are requested."""

    def __init__(self, backend):
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "minitp_requests",
            "HTTP requests by route and status",
            ["route", "status"],
            registry=self._registry,
        )
        self.seconds = Histogram(
            "minitp_request_seconds",
            "Time from a request to the end of its response",
            ["route"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self.first_token = Histogram(
            "minitp_first_token_seconds",
            "Time from a request to its first token",
            buckets=SECONDS,
            registry=self._registry,
        )
        self.each_token = Histogram(
            "minitp_token_seconds",
            "Average time between the tokens of a response",
            buckets=TOKEN_SECONDS,
            registry=self._registry,
        )
        self.prompt_tokens = Counter("minitp_prompt_tokens", "Prompt tokens", registry=self._registry)
        self.new_tokens = Counter("minitp_new_tokens", "Generated tokens", registry=self._registry)
        self._registry.register(Load(backend))

    def text(self):
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)


class Load:
    """A Prometheus collector of the state and load of the ranks."""

    def __init__(self, backend):
        self._backend = backend

    def collect(self):
        """Yield the metrics; prometheus_client calls this."""
        backend, llm = self._backend, self._backend.llm
        yield gauge("minitp_ready", "1 if requests are accepted", backend.state == "ready")
        yield CounterMetricFamily("minitp_rank_restarts", "Restarts of the ranks", backend.restarts)
        if llm is None:
            return
        about = {name: str(llm.description[name]) for name in ("tp", "dtype", "kv_dtype", "context")}
        yield InfoMetricFamily("minitp_model", "The served model", {"model": llm.source.name, **about})
        yield gauge("minitp_cache_blocks", "Blocks of the KV cache", llm.description["blocks"])
        for key, (name, description) in GAUGES.items():
            yield gauge(name, description, llm.load.get(key, 0))
        for key, (name, description) in COUNTERS.items():
            yield CounterMetricFamily(name, description, llm.load.get(key, 0))
        replicas = llm.replicas
        labels = ["replica", "rank"] if replicas else ["rank"]
        for key, (name, description) in RANK_COUNTERS.items():
            counter = CounterMetricFamily(name, description, labels=labels)
            for one in llm.ranks:
                if one[key] is not None:  # on a GPU the time in collectives is not known
                    counter.add_metric([str(one[label]) for label in labels], one[key])
            yield counter
        for key, (name, description) in REPLICA_GAUGES.items() if replicas else ():
            each = GaugeMetricFamily(name, description, labels=["replica"])
            for one in replicas:
                each.add_metric([str(one["replica"])], float(one[key]))
            yield each


def gauge(name, description, value):
    return GaugeMetricFamily(name, description, float(value))
