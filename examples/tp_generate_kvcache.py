"""Text generation on several ranks with a KV cache: prefill once, then one token a pass.

    prefill   prompt [T] ----> k, v of all T tokens into the cache, logits of the last one -> first new token
    decode    token  [1] ----> its own k, v behind them, its q against all of them         -> next token
    decode    token  [1] ----> ...

A token's keys and values depend only on the tokens up to it, so later ones do not change them: kept, they
need not be computed again. A decode pass then multiplies one row by each matrix instead of all rows so far,
and what it takes is the time to read the weights.

    rank r's cache, per layer: k and v [K_r, S, d], of its own KV heads only

So the cache is divided among the ranks as the heads are, and no rank ever reads another's.

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
    """Explained, checked, timed against the same without a cache."""
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
    here.say("  2. decode: one pass over the one new token, whose k and v go behind the others")
    prefill(model, model.new_cache(), prompt)  # warms up
    tokens, logits, seconds = collect(here, generate(model, prompt, cache))
    here.say(f"     after {NEW - 1} of them the cache holds {cache.length} positions on every rank")
    here.say_each(f"{cache.nbytes / 1e6:.2f} MB")
    here.say(f"new tokens: {' '.join(map(str, tokens))}")
    check(here, prompt, tokens, logits)
    again, _, slow = collect(here, tp_generate.generate(model, prompt))
    if tokens != again:  # on every rank alike
        raise AgreedError(f"without a cache other tokens come out: {again}", 1)
    here.say("without a cache: the same tokens")
    cached, uncached = ((s[-1] - s[0]) / (NEW - 1) * 1000 for s in (seconds, slow))  # ms
    here.say(f"time: prefill {seconds[0] * 1000:.1f} ms, then {cached:.1f} ms a token ({here.machine()})")
    here.say(f"without a cache {uncached:.1f} ms a token: {uncached / cached:.1f} times as long")


if __name__ == "__main__":
    common.run(example)
