"""Text generation on several ranks without a KV cache: each new token needs a pass over all tokens before it.

    ids = [the prompt]
      +-> pass over all ids on all ranks -> logits of the last position [V], everywhere
      |     rank 0 chooses a token and broadcasts it          the others do not choose: a rank that chose
      +---- ids = ids + [token], on every rank                another token would compute another text

A pass over n tokens costs n times as much as a pass over one token, so a text of n tokens costs as much as
n^2 / 2 of those. tp_generate_kvcache.py caches what this example computes again in every pass.

    LAYERS=2 mpirun -n 4 python examples/tp_generate.py        (MODEL=tinyllama-1.1b for other shapes)

From here on, the examples use minitp's own model, which does the same as tp_full_model.py and has a KV cache.
"""

from time import perf_counter

import common

from minitp.generate import prefill
from minitp.load import load_model
from minitp.oracle import Oracle

NEW = 16  # tokens


def generate(model, prompt):
    """Yield (token, logits float32 [V]) without end, the same on every rank."""
    ids = list(prompt)
    while True:
        cache = model.new_cache()  # discarded after this pass, so every pass starts from nothing
        logits = prefill(model, cache, ids)  # [V], after a pass over all T ids
        token = choose(model, logits)
        yield token, logits
        ids.append(token)


def choose(model, logits):
    """Return the most probable token according to rank 0, on every rank."""
    return model.comm.broadcast(int(logits.argmax()) if model.comm.rank == 0 else None)


def collect(here, generated):
    """Return the first NEW tokens, their logits [NEW, V], and the seconds until each was generated."""
    here.comm.agree()  # so that all ranks start at the same time
    started, tokens, rows, seconds = perf_counter(), [], [], []
    for token, logits in generated:
        seconds.append(perf_counter() - started)
        tokens.append(token)
        rows.append(logits)
        if len(tokens) == NEW:
            return tokens, here.device.xp.stack(rows), seconds


def check(here, prompt, tokens, logits):
    """Compare the logits that each token was chosen from with the oracle's, which come from one pass."""
    reference = Oracle(here.source.fields(), here.whole, here.source.plan.layers)
    seen = [*prompt, *tokens[:-1]]  # the last new token has been chosen, but not processed
    # Six consecutive sums per layer, and the logits. The longest has F terms.
    terms, products = here.source.config.intermediate_size, 6 * here.source.plan.layers + 1
    here.check(logits, lambda: reference.logits(seen)[len(prompt) - 1 :], terms, products)


def example(here):
    """Explain, check and time generation."""
    prompt = here.token_ids()
    model = load_model(here.source, here.comm, here.device)
    layers, vocabulary = here.source.plan.layers, here.source.config.vocab_size
    here.say(f"{here.source.name}, {layers} of its layers: {NEW} new tokens after {len(prompt)} random ones")
    here.say(
        f"  1. a pass over all {len(prompt)} tokens: logits of the last one [{vocabulary}], on every rank"
    )
    here.say("  2. rank 0 chooses the most probable token and broadcasts it")
    here.say(f"  3. a pass over all {len(prompt) + 1} tokens, and so on, up to {len(prompt) + NEW - 1}")
    prefill(model, model.new_cache(), prompt)  # warms up
    tokens, logits, seconds = collect(here, generate(model, prompt))
    here.say(f"new tokens: {' '.join(map(str, tokens))}")
    check(here, prompt, tokens, logits)
    here.say(
        f"time: {seconds[-1] / NEW * 1000:.1f} ms per token, {seconds[-1]:.2f} s for {NEW} ({here.machine()})"
    )


if __name__ == "__main__":
    common.run(example)
