"""Compute what each operation should give for the inputs that a rank really had.

Each function here computes an operation twice: by the oracle in float64, and by a third implementation, the
same formula with its result rounded to the dtype at hand and sums in float32. `tolerance` makes the bound of
these two.

Products whose result stays in float32 are summed as the device does it, `sums` (see sums.py). A result that
is rounded to 16 bits does not show how it was summed: the third implementation then sums as on a CPU.

Shape letters as in `ops`; [n, T, d] are n heads.
"""

from dataclasses import replace

import numpy as np

from minitp.check.sums import IN_FLOAT32
from minitp.check.tolerance import Expected, both, rounded
from minitp.oracle import ops as oracle_ops

BLOCK = 1 << 22  # weights in float64 at a time


def exactly(value):
    """Expect exactly this value, for copies and gathers."""
    return Expected(value)


def rms_norm(x, weight, eps):
    """Expect the RMSNorm of x [T, D] with a weight [D]: [T, D]."""
    given = x
    x, x3 = both(x)  # [T, D] each
    value = oracle_ops.rms_norm(x, weight, eps)  # [T, D]
    x32, w32 = x3.astype(np.float32), weight.astype(np.float32)  # [T, D], [D]
    third = x32 / np.sqrt(np.mean(x32 * x32, axis=-1, keepdims=True) + np.float32(eps)) * w32  # [T, D]
    return Expected(value, rounded(third, x3.dtype), np.abs(value), common=(-1,)).of(given)


def linear(x, weight, bias=None, dtype=None, sums=IN_FLOAT32):
    """Expect x W^T + b: [T, in], [out, in], [out] -> [T, out] in `dtype`, None for that of `x`."""
    given = x
    x, x3 = both(x)  # [T, in] each
    shape = (len(x), len(weight))
    value, third, scale = np.empty(shape), np.empty(shape), np.empty(shape)  # [T, out] each
    squares = np.square(x, dtype=np.float64)  # [T, in]
    step = max(1, BLOCK // max(1, weight.shape[1]))
    for start in range(0, len(weight), step):
        out = slice(start, start + step)
        w = weight[out]  # [step, in]
        b = np.zeros(len(w), np.float32) if bias is None else bias[out]  # [step]
        value[:, out] = oracle_ops.linear(x, w, b)
        third[:, out] = rounded(sums.matmul(x3, w.T) + b.astype(np.float32), dtype or x3.dtype)
        scale[:, out] = squares @ np.square(w.T, dtype=np.float64) + np.square(b, dtype=np.float64)
    terms = weight.shape[1]
    return Expected(value, third, np.sqrt(scale), terms=terms, blocks=sums.blocks(terms)).of(given)


def rope(x, positions, inverse_frequencies, factor):
    """Expect x [n, T, d] turned by the angles of positions int [T], frequencies float64 [d/2]: [n, T, d].

    The third implementation's angles are float32, as they are everywhere.
    """
    given = x
    x, x3 = both(x)  # [n, T, d] each
    value = oracle_ops.rope(x, positions, inverse_frequencies, factor)  # [n, T, d]
    angles = np.multiply.outer(
        positions.astype(np.float32), inverse_frequencies.astype(np.float32)
    )  # [T, d/2]
    factor = np.float32(factor)
    cos, sin = np.cos(angles) * factor, np.sin(angles) * factor  # [T, d/2] each
    first, second = np.split(x3.astype(np.float32), 2, axis=-1)  # [n, T, d/2] each
    third = np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)  # [n, T, d]
    pair = np.hypot(first, second, dtype=np.float64) * float(factor)  # [n, T, d/2]
    scale = np.concatenate((pair, pair), axis=-1)  # [n, T, d]
    return Expected(value, rounded(third, x3.dtype), scale, common=(0, 2)).of(given)


def scaled(x, factor):
    """Expect x times a number that is rounded to the dtype of x first, any shape."""
    value = x.astype(np.float64) * factor
    third = x.astype(np.float32) * np.asarray(factor).astype(x.dtype).astype(np.float32)
    return Expected(value, rounded(third, x.dtype), np.abs(value))


def soft_cap(x, cap):
    """Expect cap tanh(x / cap) of float32, any shape."""
    given = x
    x, x3 = both(x)
    value, cap32 = oracle_ops.soft_cap(x, cap), np.float32(cap)
    third = np.tanh(x3.astype(np.float32) / cap32) * cap32
    return Expected(value, third.astype(np.float64), np.abs(value)).of(given)


def scores(q, k, mask, root, cap=None, sums=IN_FLOAT32):
    """Expect the scores of q [H_r, T, d] and each head's keys [H_r, S, d]: float32 [H_r, T, S].

    They are -inf where the mask, bool [T, S], says no.

    Products are divided by `root`, and then within `cap`, if there is one.
    """
    if cap is not None:
        dots = scores(q, k, np.ones_like(mask), root, sums=sums)  # [H_r, T, S]
        capped = soft_cap(dots.unseen(np.float32), cap)  # [H_r, T, S]
        value, third = (np.where(mask, x, -np.inf) for x in (capped.value, capped.third))
        return replace(capped, value=value, third=third)
    value = oracle_ops.scores(q, k, mask, root)  # [H_r, T, S]
    root = np.float32(root)
    dots = sums.matmul(q, k.transpose(0, 2, 1))  # [H_r, T, S]
    third = np.where(mask, dots / root, -np.inf)  # [H_r, T, S]
    squares = np.matmul(np.square(q, dtype=np.float64), np.square(k, dtype=np.float64).transpose(0, 2, 1))
    scale = np.sqrt(squares) / root  # [H_r, T, S]
    terms = q.shape[-1]
    return Expected(value, third.astype(np.float64), scale, terms=terms, blocks=sums.blocks(terms))


def softmax(x):
    """Expect the softmax over the last axis of float32 [H_r, T, S], in float32."""
    given = x
    x, x3 = both(x)  # [H_r, T, S] each
    value = oracle_ops.softmax(x)  # [H_r, T, S]
    shifted = x3 - np.max(x3, axis=-1, keepdims=True)  # [H_r, T, S]
    terms = np.exp(shifted)  # [H_r, T, S]
    third = terms / np.sum(terms, axis=-1, keepdims=True)  # [H_r, T, S]
    # Rounding s - max moves e^(s - max) by as many units as that is large.
    scale = value * (1 + np.where(np.isfinite(shifted), -shifted, 0))  # [H_r, T, S]
    return Expected(value, third.astype(np.float64), scale, common=(-1,)).of(given)


def context(probs, v):
    """Expect the context: float32 probabilities [H_r, T, S], each head's values [H_r, S, d] -> [T, H_r d]."""
    given = probs
    probs, probs3 = both(probs)  # [H_r, T, S] each
    value = oracle_ops.context(probs, v)  # [T, H_r * d]
    third = np.concatenate(IN_FLOAT32.matmul(probs3.astype(v.dtype), v), axis=-1)  # [T, H_r * d]
    squares = np.matmul(np.square(probs, dtype=np.float64), np.square(v, dtype=np.float64))  # [H_r, T, d]
    scale = np.sqrt(np.concatenate(squares, axis=-1))  # [T, H_r * d]
    return Expected(value, rounded(third, v.dtype), scale, terms=v.shape[1]).of(given)


def geglu(gate, up):
    """Expect gelu(gate) * up: [T, F_r] twice -> [T, F_r]."""
    value = oracle_ops.geglu(gate, up)  # [T, F_r]
    g, u = gate.astype(np.float32), up.astype(np.float32)  # [T, F_r] each
    cube = np.float32(0.044715) * g * g * g  # [T, F_r]
    third = g * np.float32(0.5) * (1 + np.tanh(np.float32((2 / np.pi) ** 0.5) * (g + cube))) * u  # [T, F_r]
    # The sum 1 + tanh has roundings of 1, however small it is.
    scale = np.abs(g * u, dtype=np.float64)  # [T, F_r]
    return Expected(value, rounded(third, gate.dtype), scale)


def swiglu(gate, up):
    """Expect silu(gate) * up: [T, F_r] twice -> [T, F_r]."""
    given = gate, up
    (gate, gate3), (up, up3) = both(gate), both(up)  # [T, F_r] each
    value = oracle_ops.swiglu(gate, up)  # [T, F_r]
    g = gate3.astype(np.float32)  # [T, F_r]
    with np.errstate(over="ignore"):
        third = g / (1 + np.exp(-g)) * up3.astype(np.float32)  # [T, F_r]
    return Expected(value, rounded(third, gate3.dtype), np.abs(value)).of(*given)


def experts_act(x, chosen, gates, ups):
    """Expect SwiGLU of a token's experts: [T, D], bool [T, E], each expert's [F_r, D] twice -> [T, X, F_r].

    What comes of the gates and the ups is not seen.
    """
    shape = (len(x), int(chosen[0].sum()), len(gates[0]))
    value, third, scale = np.empty(shape), np.empty(shape), np.empty(shape)  # [T, X, F_r] each
    places = np.cumsum(chosen, axis=1) - 1  # [T, E]
    roundings, samples = 0.0, np.inf
    for expert, (gate, up) in enumerate(zip(gates, ups, strict=True)):
        rows = np.flatnonzero(chosen[:, expert])  # [n]
        if len(rows) == 0:
            continue
        unseen = [linear(x[rows], w).unseen(x.dtype) for w in (gate, up)]  # [n, F_r] each
        act = swiglu(*unseen)  # [n, F_r]
        at = rows, places[rows, expert]
        value[at], third[at], scale[at] = act.value, act.third, act.scale
        roundings, samples = max(roundings, act.roundings), min(samples, act.samples)
    return Expected(value, third, scale, roundings=roundings, samples=samples)


def experts_sum(acts, shares, downs):
    """Expect the weighted sum: [T, X, F_r], shares float64 [T, E], each expert's [D, F_r] -> [T, D]."""
    shape = (len(acts), len(downs[0]))
    value, third, squares = np.zeros(shape), np.zeros(shape, np.float32), np.zeros(shape)  # [T, D] each
    places = np.cumsum(shares > 0, axis=1) - 1  # [T, E]
    for expert, w in enumerate(downs):
        rows = np.flatnonzero(shares[:, expert])  # [n]
        act, share = acts[rows, places[rows, expert]], shares[rows, expert, None]  # [n, F_r], [n, 1]
        value[rows] += share * oracle_ops.linear(act, w)
        third[rows] += share.astype(np.float32) * IN_FLOAT32.matmul(act, w.T)
        terms = np.square(act, dtype=np.float64) @ np.square(w.T, dtype=np.float64)  # [n, D]
        squares[rows] += np.square(share) * terms
    terms = acts.shape[1] * acts.shape[2]
    return Expected(value, rounded(third, acts.dtype), np.sqrt(squares), terms=terms)


def total(parts, bias=None):
    """Expect the sum of the ranks' [T, D], and a bias [D] once: [T, D]. 16-bit terms are summed in float32.

    The third rounds the sum as an all-reduce must, before the bias comes to it.
    """
    given = parts
    parts, thirds = zip(*map(both, parts), strict=True)  # [T, D] each
    dtype = thirds[0].dtype
    terms = [*parts, np.zeros_like(parts[0][0]) if bias is None else bias]  # [T, D] each, and [D]
    value = sum(term.astype(np.float64) for term in terms)  # [T, D]
    third = rounded(sum(part.astype(np.float32) for part in thirds), dtype)  # [T, D]
    if bias is not None:
        third = rounded(third.astype(np.float32) + bias.astype(np.float32), dtype)  # [T, D]
    scale = np.sqrt(sum(np.square(term, dtype=np.float64) for term in terms))  # [T, D]
    return Expected(value, third, scale, terms=len(terms)).of(*given)


def add(x, y, multiplier=1):
    """Expect x + multiplier y, of one shape. The third rounds the product before it is added."""
    given = x, y
    (x, x3), (y, y3) = both(x), both(y)
    value = x.astype(np.float64) + multiplier * y.astype(np.float64)
    term = (np.float32(multiplier) * y3.astype(np.float32)).astype(x3.dtype)
    third = rounded(x3.astype(np.float32) + term.astype(np.float32), x3.dtype)
    return Expected(value, third, np.abs(value)).of(*given)
