"""The common mistakes in the cache and in the context.

Each function yields (description, array) for the mistakes in some steps, computed in float64 from the inputs
that the engine really had. Shape letters are those of `trace.names`.
"""

import numpy as np

from minitp.judge.mistakes.orders import in_another_order
from minitp.judge.mistakes.scores import MOST, heads_of, other_kv_heads, probability_mistakes
from minitp.oracle import ops


def context_mistakes(wrong):
    """Try mistakes in the weighted sum of the values."""
    probs, kv_heads = wrong.s("probs"), other_kv_heads(wrong)  # [H, T, S]
    for text, kv_of_head in kv_heads.items():
        yield text, ops.context(probs, heads_of(wrong, "v_cache", kv_of_head))
    if not wrong.is_recorded("probs"):
        # The context depends on both: a mistake in the KV heads of the keys is one in those of the values.
        for text, other in probability_mistakes(wrong.of_step("probs")):
            yield text, ops.context(other, heads_of(wrong, "v_cache", kv_heads.get(text)))
    yield "the values are the keys", ops.context(probs, heads_of(wrong, "k_cache"))
    right_context = ops.context(probs, heads_of(wrong, "v_cache"))  # [T, H d]
    by_head = right_context.reshape(len(right_context), len(probs), -1)  # [T, H, d]
    yield (
        "the heads are joined as [d, H], not [H, d]",
        by_head.transpose(0, 2, 1).reshape(right_context.shape),
    )
    yield "head by head, not token by token", by_head.transpose(1, 0, 2).reshape(right_context.shape)
    yield "the heads are in the reverse order", by_head[:, ::-1].reshape(right_context.shape)
    frequencies, factor = wrong.reference.rotations[wrong.layer]
    values = heads_of(wrong, "v_cache")  # [H, S, d]
    keys = np.arange(wrong.pass_.stop - values.shape[1], wrong.pass_.stop)  # [S]
    yield "the values are rotated, too", ops.context(probs, ops.rope(values, keys, frequencies, factor))
    yield from mixed_values(wrong, probs)


def mixed_values(wrong, probs):
    """Try for each query head the KV head whose values fit it best: probs [H, T, S]."""
    found, right = wrong.s("context"), list(wrong.case.replay.kv_of_head)  # [T, H d]
    values = wrong.s("v_cache")  # [K, S, d]
    if not 1 < len(values) <= MOST or found.shape[1] != len(probs) * values.shape[2]:
        return
    by_head = found.reshape(len(found), len(probs), -1).swapaxes(0, 1)  # [H, T, d]
    choices = np.stack([probs @ value for value in values])  # [K, H, T, d]
    chosen = np.abs(choices - by_head).sum(axis=(2, 3)).argmin(axis=0)  # [H]
    if list(chosen) != right:
        best = choices[chosen, np.arange(len(chosen))]  # [H, T, d]
        text = f"the query heads read the values of the KV heads {list(map(int, chosen))}, not {right}"
        yield text, best.swapaxes(0, 1).reshape(found.shape)


def cache_mistakes(wrong):
    """Try mistakes in the keys and values that attention reads."""
    cache = wrong.right()  # [K, S, d]
    if wrong.step == "k_cache":
        unrotated = wrong.s("k_norm" if wrong.reference.norms_heads else "k")  # [K, T, d]
        yield "the keys are not rotated", unrotated
        yield "the keys are the values", wrong.s("v")
    else:
        yield "the values are the keys", wrong.s("k_rope")
        frequencies, factor = wrong.reference.rotations[wrong.layer]
        keys = np.arange(wrong.pass_.stop - cache.shape[1], wrong.pass_.stop)  # [S]
        yield "the values are rotated, too", ops.rope(cache, keys, frequencies, factor)
    if cache.shape[1] > 1:
        before, newest = cache[:, -2:-1], cache[:, -1:]  # [K, 1, d] each
        yield "the newest position holds the one before it", np.concatenate((cache[:, :-1], before), axis=1)
        overwritten = np.concatenate((cache[:, :-2], newest, newest), axis=1)  # [K, S, d]
        yield "the position before the newest is overwritten with the newest", overwritten
    yield "all positions are one slot too late", np.roll(cache, 1, axis=1)
    yield "the heads are in the reverse order", cache[::-1]
    yield from in_another_order(wrong.s(wrong.step), cache, 1, "slot")
    yield from in_another_order(wrong.s(wrong.step), cache, 0, "KV head")
