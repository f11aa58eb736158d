"""The common mistakes in the scores and their softmax: the scale, the mask, the keys, a cap, and the dropout.

They are (description, array), computed in float64 from the inputs that the engine really had. Shape letters
are those of `trace.names`.
"""

import ml_dtypes
import numpy as np

from minitp.oracle import ops

CAPS = (30.0, 50.0)  # those of Gemma 2
MOST = 16  # KV heads, of which any may be read by a query head; more are not tried


def visible(wrong, shift=0, window=None):
    """Return the causal mask of the pass, bool [T, S], with the queries moved by `shift` positions."""
    keys = np.arange(wrong.pass_.stop - wrong.s("k_cache").shape[1], wrong.pass_.stop)  # [S]
    return ops.causal_mask(wrong.positions + shift, keys, window)  # [T, S]


def heads_of(wrong, step, kv_of_head=None):
    """Return the keys or values of each query head, [H_r, S, d], by default those of its KV head."""
    return wrong.s(step)[wrong.case.replay.kv_of_head if kv_of_head is None else kv_of_head]  # [H_r, S, d]


def other_kv_heads(wrong):
    """Return {description: the KV head of each query head} of common mistakes in grouped-query attention."""
    right, count = list(wrong.case.replay.kv_of_head), len(wrong.s("k_cache"))
    return {
        "the KV heads are tiled (h mod K), not repeated (h div H/K)": [h % count for h in range(len(right))],
        "the KV heads are in the reverse order": [count - 1 - kv for kv in right],
        "all query heads read the first KV head": [0] * len(right),
    }


class Scores:
    """The right scores of a pass, and those with a mistake.

    Attributes
    ----------
    mask : bool array [T, S]
    """

    def __init__(self, wrong):
        self.wrong, reference = wrong, wrong.reference
        self.window, self.root = reference.windows[wrong.layer], float(reference.score_root)
        self.cap = reference.score_cap
        self.mask = visible(wrong, window=self.window)  # [T, S]
        self._q, self._k = wrong.s("q_rope"), heads_of(wrong, "k_cache")  # [H, T, d], [H, S, d]

    def raw(self, root=None, cap="right", k=None, q=None):
        """Return the scores without a mask, [H, T, S]."""
        q, k = self._q if q is None else q, self._k if k is None else k  # [H, T, d], [H, S, d]
        cap = self.cap if cap == "right" else cap
        return ops.scores(q, k, np.ones_like(self.mask), root or self.root, cap)  # [H, T, S]

    def result(self, mask=None, **changes):
        """Return the wrong step, `scores` or `probs`, with changes to its inputs, [H, T, S]."""
        masked = np.where(self.mask if mask is None else mask, self.raw(**changes), -np.inf)  # [H, T, S]
        return masked if self.wrong.step == "scores" else ops.softmax(masked)  # [H, T, S]


def probability_mistakes(wrong):
    """Try mistakes in the scores and their softmax."""
    scores, reference = Scores(wrong), wrong.reference
    d, root, window, mask = reference.head_dim, scores.root, scores.window, scores.mask
    probs = scores.result
    yield "the scores are not scaled", probs(root=1.0)
    yield f"the scores are divided by d = {d}, not by its root", probs(root=float(d))
    yield "the scores are divided by the root of the hidden size", probs(root=reference.hidden_size**0.5)
    yield "the scores are scaled twice", probs(root=root * root)
    if not visible(wrong).all():  # a single query sees all keys, but for a window
        yield "there is no mask: queries see later keys", probs(mask=np.ones_like(mask))
    yield "the mask is off by one: a query sees the key after its own", probs(mask=visible(wrong, 1, window))
    before = visible(wrong, -1, window)  # [T, S]
    text = "the mask is off by one: a query does not see its own key"
    for result in strict(scores, before):
        yield text, result
    if window is not None:
        yield "the sliding window is ignored", probs(mask=visible(wrong))
        yield "the sliding window is one too long", probs(mask=visible(wrong, 0, window + 1))
        yield "the sliding window is one too short", probs(mask=visible(wrong, 0, max(1, window - 1)))
    if scores.cap is not None:
        yield "the soft cap of the scores is left out", probs(cap=None)
    for cap, text in other_caps(scores.cap):
        yield f"the scores have {text}", probs(cap=cap)
    for text, kv_of_head in other_kv_heads(wrong).items():
        yield text, probs(k=heads_of(wrong, "k_cache", kv_of_head))
    unrotated = wrong.s("q_norm" if reference.norms_heads else "q")
    yield "the queries are not rotated", probs(q=unrotated)
    if wrong.step == "scores":
        yield from finite_masks(scores)
    if wrong.step == "probs":
        yield "the softmax is over the queries, not over the keys", over_queries(scores)
        yield "the softmax is left out", np.where(mask, scores.raw(), 0.0)
        if wrong.is_recorded("probs"):
            yield from finite_masks(scores)
            yield from dropped(scores)
            yield from mixed_heads(scores)


def other_caps(right):
    """Yield (soft cap, its description) of caps that a model with the cap `right`, or None, does not have."""
    for cap in CAPS:
        if cap != right:
            expected = "which the model does not have" if right is None else f"not {right:g}"
            yield cap, f"a soft cap of {cap:g}, {expected}"


def strict(scores, before):
    """Yield the results of a mask without the own key, bool [T, S]: [H, T, S].

    A query that then has no key may see its own nevertheless, or all, or none.
    """
    found, empty = scores.result(mask=before), ~before.any(axis=-1)  # [H, T, S], [T]
    yield found
    if empty.any():
        own = before.copy()  # [T, S]
        own[empty, np.flatnonzero(empty) + before.shape[1] - before.shape[0]] = True
        yield scores.result(mask=own)
        if scores.wrong.step == "probs":
            yield np.where(empty[:, None], 1 / before.shape[1], found)
            yield np.where(empty[:, None], 0.0, found)


def over_queries(scores):
    """Return the softmax over the queries: each column of the result has the sum 1, [H, T, S]."""
    masked = np.where(scores.mask, scores.raw(), -np.inf)  # [H, T, S]
    return np.where(scores.mask, ops.softmax(masked.swapaxes(1, 2)).swapaxes(1, 2), 0.0)  # [H, T, S]


def finite_masks(scores):
    """Try a finite number in place of -inf, read from what the masked keys have."""
    found, raw, mask = scores.wrong.s(scores.wrong.step), scores.raw(), scores.mask  # [H, T, S] twice, [T, S]
    if scores.wrong.step == "scores":
        if not mask.all():
            value = np.median(found[:, ~mask])
            yield f"the masked scores are {shortened(value)}, not -inf", np.where(mask, raw, value)
        return
    heads, rows, keys = np.nonzero((found > 1e-30) & ~mask)
    if not len(heads):
        return
    # log p[j] - log p[own] is the difference of the two scores; the own key is always visible.
    own = rows + mask.shape[1] - mask.shape[0]
    apart = np.log(found[heads, rows, keys]) - np.log(found[heads, rows, own])  # [n]
    value = np.median(apart + raw[heads, rows, own])
    text = f"the masked scores are {shortened(value)}, not -inf"
    yield text, ops.softmax(np.where(mask, raw, value))
    value = np.median(apart + raw[heads, rows, own] - raw[heads, rows, keys])
    text = f"the mask adds {shortened(value)} to the masked scores, not -inf"
    yield text, ops.softmax(np.where(mask, raw, raw + value))


def shortened(value):
    """Return a fitted number as text, -0 and rounding errors around 0 as 0.

    >>> shortened(-3e-8), shortened(-9.9999998), shortened(1.25)
    ('0', '-10', '1.25')
    """
    return "0" if abs(value) < 1e-4 else f"{value:.4g}"


def dropped(scores):
    """Try dropout: some probabilities are 0, and the others larger in the ratio of the missing ones."""
    found, right = scores.wrong.s("probs"), scores.wrong.right()  # [H, T, S] each
    if found.shape != right.shape:
        return
    seen = right > 1e-6  # [H, T, S]
    zero, count = seen & (found == 0), seen.sum()
    if not zero.any() or zero.sum() == count:
        return
    factor = np.median(found[seen & ~zero] / right[seen & ~zero])
    share = 1 - 1 / factor
    spread = 4 * np.sqrt(max(share * (1 - share), 0) / count)
    if factor > 1 and abs(zero.sum() / count - share) < spread:
        text = f"dropout is on: {zero.sum() / count:.0%} of the probabilities are 0, and the others are "
        text += f"{factor:.4g} times as large"
        yield text, np.where(zero, 0.0, factor * right)


def mixed_heads(scores):
    """Try for each query head the KV head that fits it best."""
    wrong, mask = scores.wrong, scores.mask
    found, kv_heads = wrong.s("probs"), wrong.s("k_cache")  # [H, T, S], [K, S, d]
    right, count = list(wrong.case.replay.kv_of_head), len(kv_heads)
    if found.shape[0] != len(right) or not 1 < count <= MOST:
        return
    best, errors = np.empty_like(found), np.full(len(right), np.inf)  # [H, T, S], [H]
    chosen = np.array(right)  # [H]
    for kv in range(count):
        masked = np.where(mask, scores.raw(k=heads_of(wrong, "k_cache", [kv] * len(right))), -np.inf)
        probs = ops.softmax(masked)  # [H, T, S]
        apart = np.abs(found - probs).sum(axis=(1, 2))  # [H]
        better = apart < errors  # [H]
        best[better], errors[better], chosen[better] = probs[better], apart[better], kv
    if list(chosen) != right:
        yield f"the query heads read the KV heads {list(map(int, chosen))}, not {right}", best


def fitted_scale(wrong):
    """Try another scale of the scores, read from them or from the logarithms of the probabilities."""
    scores, found = Scores(wrong), wrong.s(wrong.step)  # [H, T, S]
    if scores.cap is not None or found.shape != wrong.right().shape:
        return
    raw = scores.raw()  # [H, T, S]
    if wrong.step == "scores":
        x, y = (each[:, scores.mask] for each in (raw, found))  # [H, n] each
    else:
        smallest = max(1e-30, float(ml_dtypes.finfo(wrong.case.recording.dtype).tiny))
        usable = (found >= smallest) & scores.mask  # [H, T, S]
        logarithms = np.log(np.where(usable, found, 1.0))  # [H, T, S]
        x, y = (centered(each, usable) for each in (raw, logarithms))  # [H, T, S] each
    size = np.vdot(x, x)
    factor = np.vdot(x, y) / size if size else 0.0
    if factor > 0:
        text = f"the scores are scaled by {described(factor / scores.root)}, not by {1 / scores.root:.6g}"
        yield text, scores.result(root=scores.root / factor)


def centered(x, usable):
    """Return x [H, T, S] minus the mean of the usable elements of each row, 0 in the others."""
    count = np.maximum(usable.sum(axis=-1, keepdims=True), 1)
    mean = np.where(usable, x, 0.0).sum(axis=-1, keepdims=True) / count  # [H, T, 1]
    return np.where(usable, x - mean, 0.0)  # [H, T, S]


def described(scale):
    """Return a scale as text, with the number of which it is the inverse root, if that is an integer.

    >>> described(0.25), described(0.3)
    ('0.25 (16^-0.5)', '0.3')
    """
    number = round(scale**-2)
    is_root = number > 0 and abs(scale**-2 / number - 1) < 5e-4
    return f"{scale:.6g}" + (f" ({number}^-0.5)" if is_root else "")
