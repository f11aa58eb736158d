"""The common mistakes in RoPE, the cache, the scores and their softmax, and the context.

Each function yields (description, array) for the mistakes in some steps, computed in float64 from the inputs
that the engine really had. Shape letters are those of `trace.names`.
"""

import numpy as np

from minitp.compare.heads import half_split, interleaved
from minitp.oracle import ops


def rope_mistakes(wrong):
    """Try mistakes in RoPE."""
    reference, part = wrong.reference, wrong.step[0]
    x = wrong.s(f"{part}_norm" if reference.norms_heads else part)  # [n, T, d]
    at, (frequencies, factor) = wrong.positions, reference.rotations[wrong.layer]
    pairs = 2 * len(frequencies)

    def turned(by, frequencies=frequencies, factor=factor):
        return ops.rope(x, by, frequencies, factor)  # [n, T, d]

    if at[0] > 0:
        yield "the positions begin at 0 in this pass", turned(at - at[0])
    yield "not rotated", x
    in_pairs = interleaved(ops.rope(half_split(x, pairs), at, frequencies, factor), pairs)  # [n, T, d]
    yield "rotated in pairs (x[2i], x[2i+1]), not (x[i], x[i+d/2]): the other RoPE layout", in_pairs
    yield "rotated in the opposite direction", turned(-at)
    yield "the positions are one too large", turned(at + 1)
    yield "the positions are one too small", turned(at - 1)
    yield "all tokens have the first position", turned(np.full_like(at, at[0]))
    yield "rotated twice", ops.rope(turned(at), at, frequencies, factor)
    if factor != 1:
        yield "without the attention factor", turned(at, factor=1.0)
    for layer, rotation in enumerate(reference.rotations):
        if (rotation[0] != frequencies).any():
            yield f"rotated with the RoPE of layer {layer}, not of layer {wrong.layer}", turned(at, *rotation)
            break
    plain = [2 * i / pairs for i in range(pairs // 2)]
    thetas = {float(wrong.case.recording.config.rope.rope_theta), 1e4, 1e5, 5e5, 1e6}
    for theta in sorted(thetas):
        other = np.array([theta**-exponent for exponent in plain])  # [R/2]
        if not np.allclose(other, frequencies, rtol=1e-9):
            yield f"rope_theta {theta:g} without scaling", turned(at, other, 1.0)


def visible(wrong, shift=0, window=None):
    """Return the causal mask of the pass, bool [T, S], with the queries moved by `shift` positions."""
    keys = np.arange(wrong.pass_.stop - wrong.s("k_cache").shape[1], wrong.pass_.stop)  # [S]
    return ops.causal_mask(wrong.positions + shift, keys, window)  # [T, S]


def heads_of(wrong, step, tiled=False):
    """Return the keys or values of each query head, [H_r, S, d]: repeated, or by mistake tiled."""
    x, kv_of_head = wrong.s(step), wrong.case.replay.kv_of_head  # [K_r, S, d]
    return x[[h % len(x) if tiled else kv for h, kv in enumerate(kv_of_head)]]  # [H_r, S, d]


def probability_mistakes(wrong):
    """Try mistakes in the scores and their softmax."""
    reference = wrong.reference
    window, root, cap = reference.windows[wrong.layer], reference.score_root, reference.score_cap
    q, k, d = wrong.s("q_rope"), heads_of(wrong, "k_cache"), reference.head_dim  # [H, T, d], [H, S, d]
    mask = visible(wrong, window=window)  # [T, S]

    def probs(mask=mask, root=root, cap=cap, k=k, q=q):
        found = ops.scores(q, k, mask, root, cap)  # [H, T, S]
        return found if wrong.step == "scores" else ops.softmax(found)  # [H, T, S]

    yield "the scores are not scaled", probs(root=1.0)
    yield f"the scores are divided by d = {d}, not by its root", probs(root=float(d))
    yield "the scores are divided by the root of the hidden size", probs(root=reference.hidden_size**0.5)
    yield "the scores are scaled twice", probs(root=root * root)
    if len(mask) > 1 or (~mask).any():
        yield "there is no mask: queries see later keys", probs(mask=np.ones_like(mask))
    yield "the mask is off by one: a query sees the key after its own", probs(mask=visible(wrong, 1, window))
    before = visible(wrong, -1, window)  # [T, S]
    if before.any(axis=-1).all():
        yield "the mask is off by one: a query does not see its own key", probs(mask=before)
    if window is not None:
        yield "the sliding window is ignored", probs(mask=visible(wrong))
        yield "the sliding window is one too long", probs(mask=visible(wrong, 0, window + 1))
        yield "the sliding window is one too short", probs(mask=visible(wrong, 0, max(1, window - 1)))
    if cap is not None:
        yield "the soft cap of the scores is left out", probs(cap=None)
    tiled = heads_of(wrong, "k_cache", tiled=True)
    yield "the KV heads are tiled (h mod K), not repeated (h div H/K)", probs(k=tiled)
    unrotated = wrong.s("q_norm" if reference.norms_heads else "q")
    yield "the queries are not rotated", probs(q=unrotated)


def context_mistakes(wrong):
    """Try mistakes in the weighted sum of the values."""
    probs = wrong.s("probs")  # [H, T, S]
    tiled = heads_of(wrong, "v_cache", tiled=True)
    yield "the KV heads are tiled (h mod K), not repeated (h div H/K)", ops.context(probs, tiled)
    if not wrong.is_recorded("probs"):
        for text, other in probability_mistakes(wrong):
            yield text, ops.context(other, tiled if "tiled" in text else heads_of(wrong, "v_cache"))
    yield "the values are the keys", ops.context(probs, heads_of(wrong, "k_cache"))
    right_context = ops.context(probs, heads_of(wrong, "v_cache"))  # [T, H d]
    by_head = right_context.reshape(len(right_context), len(probs), -1)  # [T, H, d]
    yield (
        "the heads are joined as [d, H], not [H, d]",
        by_head.transpose(0, 2, 1).reshape(right_context.shape),
    )
    yield "head by head, not token by token", by_head.transpose(1, 0, 2).reshape(right_context.shape)


def cache_mistakes(wrong):
    """Try mistakes in the keys and values that attention reads."""
    cache = wrong.right()  # [K, S, d]
    if wrong.step == "k_cache":
        unrotated = wrong.s("k_norm" if wrong.reference.norms_heads else "k")  # [K, T, d]
        yield "the keys are not rotated", unrotated
        yield "the keys are the values", wrong.s("v")
    else:
        yield "the values are the keys", wrong.s("k_rope")
    if cache.shape[1] > 1:
        before, newest = cache[:, -2:-1], cache[:, -1:]  # [K, 1, d] each
        yield "the newest position holds the one before it", np.concatenate((cache[:, :-1], before), axis=1)
        overwritten = np.concatenate((cache[:, :-2], newest, newest), axis=1)  # [K, S, d]
        yield "the position before the newest is overwritten with the newest", overwritten
    yield "all positions are one slot too late", np.roll(cache, 1, axis=1)
    yield "the heads are in the reverse order", cache[::-1]
