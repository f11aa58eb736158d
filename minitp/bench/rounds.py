"""Times of prompts and continuations, run as users run them, and the limits for the same shapes."""

from dataclasses import dataclass
from time import perf_counter

import numpy as np

from minitp.generate import chunks, generate, host_logits, prefill
from minitp.paged_cache import PagedCache
from minitp.request import Request
from minitp.sampling import SamplingParams
from minitp.trace.record import ObservedSteps

BLOCK_SIZE = 16  # tokens per block of a paged cache


@dataclass
class Round:
    """The times of one prompt and its continuation, with their limits.

    Attributes
    ----------
    ttft_s : float
        Time to the first token.
    decode_s : float
        Time per token after the first.
    bare_prefill_s, bare_decode_s : float
        Minimum times of the prompt's passes, and of a token's pass.
    all_reduce_shares : list of float
        Share of the decode time that each rank spends in collectives, including waiting.
    """

    ttft_s: float
    decode_s: float
    bare_prefill_s: float
    bare_decode_s: float
    all_reduce_shares: list


def random_prompt(config, tokens, seed=0):
    """Return `tokens` random token ids, the same for the same seed."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, tokens).tolist()


def request_of(prompt, new_tokens):
    """Return a greedy Request for exactly `new_tokens` tokens."""
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    return Request(params, (), prompt, len(prompt) + new_tokens)


def timed_round(model, roofline, prompt, new_tokens):
    """Time a prompt and at least 2 new tokens; return a Round on every rank."""
    comm = model.comm
    bare_prefill = bare_prefill_seconds(model, roofline, len(prompt))
    bare_decode = bare_decode_seconds(model, roofline, 1, len(prompt) + new_tokens // 2)
    request = request_of(prompt, new_tokens) if comm.rank == 0 else None
    comm.allgather_object(None)
    started = first = None
    for _ in generate(model, prompt, request):
        if first is None:
            started, first = perf_counter(), comm.seconds
    share = (comm.seconds - first) / (perf_counter() - started)
    ttft, rate = comm.broadcast((request.ttft_s, request.decode_tokens_per_s) if comm.rank == 0 else None)
    return Round(ttft, 1 / rate, bare_prefill, bare_decode, comm.allgather_object(share))


def bare_prefill_seconds(model, roofline, tokens):
    """Return the minimum time of a prompt's passes."""
    passes = []
    for start, stop in chunks(model, tokens):
        part = stop - start, keys_read(model, stop, stop - start)
        passes.append(([part], 1 if stop == tokens else 0))
    return roofline.seconds(passes)


def bare_decode_seconds(model, roofline, sequences, context):
    """Return the minimum time of a pass with one token of each of `sequences`."""
    return roofline.seconds([([(1, keys_read(model, context, 1))] * sequences, sequences)])


def keys_read(model, stop, tokens):
    """Return the average number of keys per layer that a pass of `tokens` tokens up to `stop` reads."""
    windows = model.config.windows
    return sum(stop if w is None else min(stop, w + tokens - 1) for w in windows) // len(windows)


def timed_batch(model, prompt, sequences, passes):
    """Return the time in seconds of a decode pass of `sequences` that continue `prompt` greedily."""
    comm = model.comm
    caches = new_caches(model, sequences, len(prompt) + passes + 1)
    tokens = []
    for cache in caches:
        logits = prefill(model, cache, prompt)  # [V]
        tokens.append(int(logits.argmax()))

    def decode():
        parts = [([token], cache) for token, cache in zip(tokens, caches, strict=True)]
        logits = host_logits(model, model.forward_batch(parts, logits_at=slice(None)))  # [sequences, V]
        return comm.broadcast(logits.argmax(axis=-1).tolist() if comm.rank == 0 else None)

    if model.fused:
        tokens = decode()  # captures the graph
    comm.allgather_object(None)
    started = perf_counter()
    for _ in range(passes):
        tokens = decode()
    return comm.broadcast((perf_counter() - started) / passes)


def new_caches(model, sequences, capacity):
    """Return empty caches of `capacity` positions each; on the fused path they share one pool."""
    if not model.fused:
        return [model.new_cache(capacity) for _ in range(sequences)]
    blocks = -(-capacity // BLOCK_SIZE)
    pool = model.new_pool(sequences * blocks, BLOCK_SIZE)
    return [PagedCache(pool, list(range(n * blocks, (n + 1) * blocks))) for n in range(sequences)]


# Steps that one operation computes together; its time is counted once for all of them.
TOGETHER = ("q k v", "q_norm k_norm", "q_rope k_rope", "k_cache v_cache", "gate up")
ONE_OPERATION = {step: steps for steps in TOGETHER for step in steps.split()}


class StepTimer:
    """A `record` that measures each step as the time since the previous one.

    Attributes
    ----------
    seconds : dict of str to float
        Seconds summed over layers and passes, by the names of the steps that one operation computes, in
        their order.
    """

    def __init__(self):
        self.seconds = {}
        self._last = None

    def start(self):
        """Begin a pass."""
        self._last = perf_counter()

    def __call__(self, block=None, layer=None, sequence=None):
        before = "" if block is None else f"{block}."

        def observe(step, array):
            now, name = perf_counter(), before + ONE_OPERATION.get(step, step)
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
            self._last = perf_counter()  # excludes the time of this function

        return ObservedSteps(observe)


def profile(model, prompt, new_tokens):
    """Return this rank's seconds of each step in two dicts, for the prompt and for a decode pass."""
    cache, profiles = model.new_cache(len(prompt) + new_tokens), []
    prompts = [prompt[start:stop] for start, stop in chunks(model, len(prompt))]
    for passes in (prompts, [[token] for token in prompt[:1] * new_tokens]):
        timer = StepTimer()
        model.comm.allgather_object(None)
        for ids in passes:
            timer.start()
            model.forward(ids, cache, logits_at=slice(-1, None), record=timer)
        count = 1 if passes is prompts else new_tokens
        profiles.append({name: seconds / count for name, seconds in timer.seconds.items()})
    return profiles


def private_bytes():
    """Return the bytes that this process has allocated, excluding mapped files."""
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return 1024 * sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))
