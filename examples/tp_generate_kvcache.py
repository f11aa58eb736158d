"""Text generation on several ranks with a KV cache: prefill once, then one token per pass.

    prefill   prompt [T] ----> k, v of all T tokens into the cache, logits of the last one -> first new token
    decode    token  [1] ----> its k, v are appended, its q attends to all of them         -> next token
    decode    token  [1] ----> ...

A token's keys and values depend only on that token and the ones before it. Later tokens do not change them,
so they can be kept. A decode pass then multiplies one row by each matrix instead of all rows so far, and
takes about as long as reading the weights.

    rank r's cache, per layer: k and v [K_r, S, d], of its own KV heads only

So the cache is split over the ranks like the heads, and no rank ever reads another rank's cache.

    LAYERS=2 mpirun -n 4 python examples/tp_generate_kvcache.py        (MODEL=tinyllama-1.1b for other shapes)
"""

import common
import tp_generate
from tp_generate import NEW, check, choose, collect

from minitp.errors import AgreedError
from minitp.generate import prefill
from minitp.load import load_model


def generate(model, prompt, cache):
    """Yield (token, logits float32 [V]) without end, the same on every rank."""
    logits = prefill(model, cache, prompt)  # [V], after a pass over all T tokens of the prompt
    while True:
        token = choose(model, logits)
        yield token, logits
        logits = model.forward([token], cache, logits_at=slice(-1, None))[0]  # [V], after a pass over one


def example(here):
    """Explain and check generation with a cache, and compare its time with generation without one."""
    config, prompt = here.source.config, here.token_ids()
    model = load_model(here.source, here.comm, here.device)
    cache = model.new_cache()
    T, d = len(prompt), config.head_dim
    here.say(
        f"{here.source.name}, {here.source.plan.layers} of its layers: {NEW} new tokens after {T} random ones"
    )
    here.say(f"  1. prefill: one pass over {T} tokens fills the cache, k and v in each layer")
    kv_heads = common.span(here.source.plan.kv_head_ranges[here.comm.rank])
    here.say_each(f"KV heads {kv_heads}: k, v [{model.kv_heads}, {T}, {d}]")
    here.say("  2. decode: one pass over each new token, whose k and v are appended")
    prefill(model, model.new_cache(), prompt)  # warms up
    tokens, logits, seconds = collect(here, generate(model, prompt, cache))
    here.say(f"     after {NEW - 1} of them the cache holds {cache.length} positions on every rank")
    here.say_each(f"{cache.nbytes / 1e6:.2f} MB")
    here.say(f"new tokens: {' '.join(map(str, tokens))}")
    check(here, prompt, tokens, logits)
    again, _, slow = collect(here, tp_generate.generate(model, prompt))
    if tokens != again:  # the same on all ranks
        raise AgreedError(f"without a cache, the tokens differ: {again}", 1)
    here.say("without a cache: the same tokens")
    cached, uncached = ((s[-1] - s[0]) / (NEW - 1) * 1000 for s in (seconds, slow))  # ms
    here.say(f"time: prefill {seconds[0] * 1000:.1f} ms, then {cached:.1f} ms per token ({here.machine()})")
    here.say(f"without a cache {uncached:.1f} ms per token: {uncached / cached:.1f} times as long")


if __name__ == "__main__":
    common.run(example)
