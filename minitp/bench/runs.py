"""Timed runs of the model itself, as a user runs it, beside the limit of the same shapes."""

from dataclasses import dataclass
from time import perf_counter

import numpy as np

from minitp.generate import chunks, generate, host_logits, prefill
from minitp.paged_cache import PagedCache
from minitp.request import Request
from minitp.sampling import SamplingParams
from minitp.trace.record import ObservedSteps

BLOCK_SIZE = 16  # of paged caches


@dataclass
class Run:
    """One prompt and its continuation, beside the limit.

    Attributes
    ----------
    ttft_s : float
        Time to the first token.
    decode_s : float
        A token after the first.
    bare_prefill_s, bare_decode_s : float
        What these take at least.
    all_reduce_shares : list of float
        Of the decode time, on each rank in collectives, waiting included.
    """

    ttft_s: float
    decode_s: float
    bare_prefill_s: float
    bare_decode_s: float
    all_reduce_shares: list


def random_prompt(config, tokens, seed=0):
    """Token ids [tokens] of a text that says nothing; of one seed always the same."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, tokens).tolist()


def request_of(prompt, new_tokens):
    """Greedy, of exactly so many tokens."""
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    return Request(params, (), prompt, len(prompt) + new_tokens)


def timed_run(model, limits, prompt, new_tokens):
    """A Run, on every rank; `new_tokens` are at least 2."""
    comm = model.comm
    bare_prefill = bare_prefill_seconds(model, limits, len(prompt))
    bare_decode = bare_decode_seconds(model, limits, 1, len(prompt) + new_tokens // 2)
    request = request_of(prompt, new_tokens) if comm.rank == 0 else None
    comm.allgather_object(None)
    started = first = None
    for _ in generate(model, prompt, request):
        if first is None:
            started, first = perf_counter(), comm.seconds
    share = (comm.seconds - first) / (perf_counter() - started)
    ttft, rate = comm.broadcast((request.ttft_s, request.decode_tokens_per_s) if comm.rank == 0 else None)
    return Run(ttft, 1 / rate, bare_prefill, bare_decode, comm.allgather_object(share))


def bare_prefill_seconds(model, limits, tokens):
    """What a prompt's passes take at least."""
    passes = []
    for start, stop in chunks(model, tokens):
        part = stop - start, keys_read(model, stop, stop - start)
        passes.append(([part], 1 if stop == tokens else 0))
    return limits.seconds(passes)


def bare_decode_seconds(model, limits, sequences, context):
    """What one token of each of so many sequences takes at least."""
    return limits.seconds([([(1, keys_read(model, context, 1))] * sequences, sequences)])


def keys_read(model, stop, tokens):
    """How many keys a pass of `tokens` tokens that ends at position `stop` reads, a layer in the mean."""
    windows = model.config.windows
    return sum(stop if w is None else min(stop, w + tokens - 1) for w in windows) // len(windows)


def timed_batch(model, prompt, sequences, steps):
    """Seconds of a decode step of so many sequences, each of which continues `prompt` greedily."""
    comm = model.comm
    caches = new_caches(model, sequences, len(prompt) + steps + 1)
    tokens = []
    for cache in caches:
        logits = prefill(model, cache, prompt)  # [V]
        tokens.append(int(logits.argmax()))

    def step():
        parts = [([token], cache) for token, cache in zip(tokens, caches, strict=True)]
        logits = host_logits(model, model.forward_batch(parts, logits_at=slice(None)))  # [sequences, V]
        return comm.broadcast(logits.argmax(axis=-1).tolist() if comm.rank == 0 else None)

    if model.fused:
        tokens = step()  # the first one is captured
    comm.allgather_object(None)
    started = perf_counter()
    for _ in range(steps):
        tokens = step()
    return comm.broadcast((perf_counter() - started) / steps)


def new_caches(model, sequences, capacity):
    """Empty caches for so many positions each. The fused path's sequences of one step share a pool."""
    if not model.fused:
        return [model.new_cache(capacity) for _ in range(sequences)]
    blocks = -(-capacity // BLOCK_SIZE)
    pool = model.new_pool(sequences * blocks, BLOCK_SIZE)
    return [PagedCache(pool, list(range(n * blocks, (n + 1) * blocks))) for n in range(sequences)]


# Steps that one operation makes together, for which it is charged once.
TOGETHER = ("q k v", "q_norm k_norm", "q_rope k_rope", "k_cache v_cache", "gate up")
ONE_OPERATION = {step: steps for steps in TOGETHER for step in steps.split()}


class StepTimer:
    """A `record` that charges each step with the time since the last one.

    Attributes
    ----------
    seconds : dict of str to float
        By the names of the steps that one operation makes, in the order in which they come: summed over
        layers and passes.
    """

    def __init__(self):
        self.seconds = {}
        self._last = None

    def start(self):
        """A pass begins now."""
        self._last = perf_counter()

    def __call__(self, block=None, layer=None):
        before = "" if block is None else f"{block}."

        def observe(step, array):
            now, name = perf_counter(), before + ONE_OPERATION.get(step, step)
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
            self._last = perf_counter()  # without the time that this took

        return ObservedSteps(observe)


def profile(model, prompt, steps):
    """Seconds by step, of the prompt's passes and of a decode pass: two dicts, of this rank."""
    cache, found = model.new_cache(len(prompt) + steps), []
    prompts = [prompt[start:stop] for start, stop in chunks(model, len(prompt))]
    for passes in (prompts, [[token] for token in prompt[:1] * steps]):
        timer = StepTimer()
        model.comm.allgather_object(None)
        for ids in passes:
            timer.start()
            model.forward(ids, cache, logits_at=slice(-1, None), record=timer)
        per = 1 if passes is prompts else steps
        found.append({name: seconds / per for name, seconds in timer.seconds.items()})
    return found


def private_bytes():
    """Memory of this process that is its own: what it has allocated, without the files that it has mapped."""
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return 1024 * sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))
