"""The speed of many concurrent requests, next to the same requests one at a time and the machine's limit."""

from statistics import median
from time import perf_counter

from minitp.bench.rounds import BLOCK_SIZE, keys_read, random_prompt, request_of
from minitp.engine.engine import Engine
from minitp.generate import generate
from minitp.model import unrecorded


def measure_requests(model, roofline, job, progress):
    """Measure job.requests requests; return a dict for JSON of new tokens per second, medians over rounds.

    Three speeds are measured: of all requests at once, of the same requests one by one, and the limit. All
    rounds use one engine, as in a server. Each round has new prompts, because the engine's prefix cache would
    otherwise contain the prompts of the previous round.

    Replicas divide the requests and begin together; the slowest one counts. One by one means that replica 0
    computes all requests while the others sleep.
    """
    tokens = job.requests * job.new_tokens
    recorded = RecordingModel(model)
    engine = engine_for(recorded, job.requests, job.prompt_tokens + job.new_tokens)
    groups = model.comm.all_groups
    replica, replicas = groups.rank // model.comm.size, groups.size // model.comm.size
    seconds = {"together": [], "one_by_one": [], "limit": []}
    if model.fused:  # captures the graphs of all batch sizes
        together_seconds(engine, request_prompts(model, job, job.rounds), job.new_tokens)
        one_by_one_seconds(model, request_prompts(model, job, job.rounds)[:1], job.new_tokens)
    for n in range(job.rounds):
        progress(f"round {n + 1} of {job.rounds}")
        prompts = request_prompts(model, job, n)
        recorded.passes.clear()
        together = together_seconds(engine, prompts[replica::replicas], job.new_tokens)
        limit = roofline.seconds(recorded.passes)
        one_by_one = 0.0 if replica else one_by_one_seconds(model, prompts, job.new_tokens)
        for name, own in (("together", together), ("limit", limit), ("one_by_one", one_by_one)):
            seconds[name].append(max(groups.allgather_object(own)))
    pairs = list(zip(*seconds.values(), strict=True))
    return {
        "count": job.requests,
        "prompt_tokens": job.prompt_tokens,
        "new_tokens": job.new_tokens,
        "steps": len(recorded.passes),
        **{f"{name}_tokens_per_s": tokens / median(values) for name, values in seconds.items()},
        "times_one_by_one": median(single / served for served, single, _ in pairs),
        "share_of_limit": median(limit / served for served, _, limit in pairs),
    }


def engine_for(model, requests, positions):
    """Return an Engine with room for `requests` concurrent requests of `positions` tokens each."""
    blocks = requests * -(-positions // BLOCK_SIZE)
    return Engine(model, blocks, BLOCK_SIZE, max_sequences=requests)


def request_prompts(model, job, seed):
    """Return a list of token ids for each request of a round."""
    ids = random_prompt(model.config, job.requests * job.prompt_tokens, seed)
    return [ids[start : start + job.prompt_tokens] for start in range(0, len(ids), job.prompt_tokens)]


def together_seconds(engine, prompts, new_tokens):
    """Return the time in seconds of a replica's requests, served concurrently; all begin together."""
    comm = engine.model.comm
    if comm.rank == 0:
        for prompt in prompts:
            engine.add(request_of(prompt, new_tokens))
    comm.all_groups.allgather_object(None)
    started = perf_counter()
    engine.run()
    return comm.broadcast(perf_counter() - started)


class RecordingModel:
    """A model that records the shapes of its forward passes."""

    def __init__(self, model):
        self.model, self.passes = model, []
        self.comm, self.device, self.new_pool = model.comm, model.device, model.new_pool
        self.config, self.plan = model.config, model.plan
        self.fused, self.prefill_chunk = model.fused, model.prefill_chunk

    def forward_batch(self, parts, logits_at=slice(None), record=unrecorded):
        """Record the shapes of a pass, then run Model.forward_batch."""
        self._record(parts, 0 if logits_at is None else len(logits_at))
        return self.model.forward_batch(parts, logits_at, record)

    def batches_ahead(self, pool, sequences):
        """Return the model's BatchesAhead, which now records each batch as one pass."""
        ahead = self.model.batches_ahead(pool, sequences)
        launch = ahead.launch

        def recorded_launch(batch, parts):
            self._record(parts, len(batch.logits_at))
            launch(batch, parts)

        ahead.launch = recorded_launch
        return ahead

    def _record(self, parts, num_logits):
        shapes = [
            (len(ids), keys_read(self.model, cache.length + len(ids), len(ids))) for ids, cache in parts
        ]
        self.passes.append((shapes, num_logits))


def one_by_one_seconds(model, prompts, new_tokens):
    """Return the time in seconds of the same requests, one after another."""
    comm = model.comm
    comm.allgather_object(None)
    started = perf_counter()
    for prompt in prompts:
        for _ in generate(model, prompt, request_of(prompt, new_tokens) if comm.rank == 0 else None):
            pass
    return comm.broadcast(perf_counter() - started)
