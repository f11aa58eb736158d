"""What Prometheus sees of the server."""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
GAUGES = {
    "running": ("minitp_sequences_running", "Continuations that take part in the steps"),
    "waiting": ("minitp_sequences_waiting", "Continuations that wait for room"),
    "blocks_in_use": ("minitp_cache_blocks_in_use", "Blocks of the KV cache that sequences use"),
}
COUNTERS = {
    "preempted": (
        "minitp_preemptions",
        "Sequences that had to give their blocks back, since the ranks started",
    ),
    "reused_tokens": (
        "minitp_prefix_tokens_reused",
        "Prompt tokens found in the cache, since the ranks started",
    ),
}


class Metrics:
    """Counts of requests and times, in a registry of their own; the load is read when somebody looks."""

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
            "From a request to the end of its answer",
            ["route"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self.first_token = Histogram(
            "minitp_first_token_seconds",
            "From a request to its first token",
            buckets=SECONDS,
            registry=self._registry,
        )
        self.each_token = Histogram(
            "minitp_token_seconds",
            "Between the tokens of a continuation, on average",
            buckets=TOKEN_SECONDS,
            registry=self._registry,
        )
        self.prompt_tokens = Counter("minitp_prompt_tokens", "Tokens of prompts", registry=self._registry)
        self.new_tokens = Counter("minitp_new_tokens", "Tokens generated", registry=self._registry)
        self._registry.register(Load(backend))

    def text(self):
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)


class Load:
    """How busy the ranks are, and whether they are there."""

    def __init__(self, backend):
        self._backend = backend

    def collect(self):
        """As prometheus_client calls it."""
        backend, llm = self._backend, self._backend.llm
        yield gauge("minitp_ready", "Whether requests are taken", backend.state == "ready")
        yield CounterMetricFamily(
            "minitp_rank_restarts", "Times the ranks were started again", backend.restarts
        )
        if llm is None:
            return
        about = {name: str(llm.description[name]) for name in ("tp", "dtype", "kv_dtype", "context")}
        yield InfoMetricFamily("minitp_model", "What is served", {"model": llm.source.name, **about})
        yield gauge("minitp_cache_blocks", "Blocks of the KV cache", llm.description["blocks"])
        for key, (name, words) in GAUGES.items():
            yield gauge(name, words, llm.load.get(key, 0))
        for key, (name, words) in COUNTERS.items():
            yield CounterMetricFamily(name, words, llm.load.get(key, 0))


def gauge(name, words, value):
    return GaugeMetricFamily(name, words, float(value))
