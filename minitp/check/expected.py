"""The expected value of each operation for a rank's recorded inputs, and the scale of its errors.

Every function computes an operation twice: as the oracle does, in float64 (`value`), and as the low-precision
reference (`lowp`), which is the same formula with sums in float32 and the result rounded to the run's dtype.
Together with the `scale` they are y, r and c in `tolerance`, which computes the bounds from them.

Products whose result stays in float32 are summed as the device sums them (see `sums`). A result that is
rounded to 16 bits does not show how it was summed, so its low-precision reference sums as a CPU does.

Shape letters are those of `ops`; [n, T, d] are n heads. `x_lp` is the value of the input x for the
low-precision reference.
"""

from dataclasses import replace

import numpy as np

from minitp.check.sums import IN_FLOAT32
from minitp.check.tolerance import Expected, NotRecorded, Stored, both, rounded, roundoff, scale_of
from minitp.oracle import ops as oracle_ops

BLOCK = 1 << 22  # number of weights that are converted to float64 at a time


def exactly(value):
    """Return the Expected of a copy or a gather, which must equal `value` exactly, if that was recorded."""
    if not isinstance(value, NotRecorded):
        return Expected(value)
    lowp = value.low_precision_reference.astype(np.float64)
    return Expected(value.value, lowp, value.scale).with_inputs(value)


def rms_norm(x, weight, eps):
    """Return the Expected of RMSNorm: x [T, D], weight [D] -> [T, D]."""
    inputs = x
    x, x_lp = both(x)  # [T, D] each
    value = oracle_ops.rms_norm(x, weight, eps)  # [T, D]
    x32, w32 = x_lp.astype(np.float32), weight.astype(np.float32)  # [T, D], [D]
    lowp = x32 / np.sqrt(np.mean(x32 * x32, axis=-1, keepdims=True) + np.float32(eps)) * w32  # [T, D]
    return Expected(value, rounded(lowp, x_lp.dtype), np.abs(value), common=(-1,)).with_inputs(inputs)


def linear(x, weight, bias=None, dtype=None, sums=IN_FLOAT32):
    """Return the Expected of x W^T + b: x [T, in], weight [out, in], bias [out] -> [T, out].

    The result is in `dtype`, by default that of `x`.
    """
    inputs = x
    x, x_lp = both(x)  # [T, in] each
    shape = (len(x), len(weight))
    value, lowp, squares = np.empty(shape), np.empty(shape), np.empty(shape)  # [T, out] each
    x2 = np.square(x, dtype=np.float64)  # [T, in]
    rows = max(1, BLOCK // max(1, weight.shape[1]))
    for start in range(0, len(weight), rows):
        out = slice(start, start + rows)
        w = weight[out]  # [rows, in]
        b = np.zeros(len(w), np.float32) if bias is None else bias[out]  # [rows]
        value[:, out] = oracle_ops.linear(x, w, b)
        lowp[:, out] = rounded(sums.matmul(x_lp, w.T) + b.astype(np.float32), dtype or x_lp.dtype)
        squares[:, out] = x2 @ np.square(w.T, dtype=np.float64) + np.square(b, dtype=np.float64)
    terms = weight.shape[1]
    scale = scale_of_sum(value, squares)  # [T, out]
    return Expected(value, lowp, scale, terms=terms, blocks=sums.blocks(terms)).with_inputs(inputs)


def scale_of_sum(value, squares):
    """Return c of some sums, from their values and the sums of the squares of their terms; any shape."""
    return np.sqrt(squares + np.square(value))


def rope(x, positions, inverse_frequencies, factor):
    """Return the Expected of RoPE: x [n, T, d], positions int [T], frequencies [R/2] -> [n, T, d].

    The low-precision reference computes the angles in float32, as every implementation does. The dimensions
    after the first R are copied, so their only errors are those of an input that was not recorded.
    """
    inputs, copied = x, scale_of(x)
    x, x_lp = both(x)  # [n, T, d] each
    value = oracle_ops.rope(x, positions, inverse_frequencies, factor)  # [n, T, d]
    frequencies = inverse_frequencies.astype(np.float32)  # [R/2]
    angles = np.multiply.outer(positions.astype(np.float32), frequencies)  # [T, R/2]
    factor, pairs = np.float32(factor), len(frequencies)
    cos, sin = np.cos(angles) * factor, np.sin(angles) * factor  # [T, R/2] each
    # [n, T, R/2], [n, T, R/2], [n, T, d - R]
    first, second, rest = np.split(x_lp.astype(np.float32), [pairs, 2 * pairs], axis=-1)
    turned = first * cos - second * sin, second * cos + first * sin  # [n, T, R/2] each
    lowp = np.concatenate((*turned, rest), axis=-1)  # [n, T, d]
    pair = np.hypot(first, second, dtype=np.float64) * float(factor)  # [n, T, R/2]
    scale = np.broadcast_to(copied, x.shape).copy()  # [n, T, d]
    scale[..., : 2 * pairs] = np.concatenate((pair, pair), axis=-1)  # [n, T, R]
    return Expected(value, rounded(lowp, x_lp.dtype), scale, common=(0, 2)).with_inputs(inputs)


def stored(x, kv_dtype):
    """Return the Expected of keys or values that are written to a cache in `kv_dtype`: x [K_r, S, d].

    A run should read exactly what this function computes. If it does not, each number may differ from x by
    the error of the cache's dtype (for int8, half the scale of the position and head; for float16, the
    rounding to it), plus the rounding of the result.
    """
    if kv_dtype == "auto":
        return exactly(x)
    value = x.astype(np.float64)  # [K_r, S, d]
    read = dequantized(x, kv_dtype).astype(x.dtype)  # [K_r, S, d]
    if kv_dtype == "int8":
        allowed = np.abs(value).max(axis=-1, keepdims=True, initial=0) / 127 / 2  # [K_r, S, 1]
    else:
        allowed = np.abs(value) * roundoff(kv_dtype)  # [K_r, S, d]
    allowed = allowed + 2 * roundoff(x.dtype) * np.abs(value)  # [K_r, S, d]
    return Stored(value, read=read, allowed=allowed)


def dequantized(x, kv_dtype):
    """Return x [K_r, S, d] as it is read from a cache in `kv_dtype`, in float32.

    A cache in int8 holds x / scale, rounded to the nearest integer, where scale is max |x| / 127 of each head
    and position; all of this is computed in float32.
    """
    x = x.astype(np.float32)  # [K_r, S, d]
    if kv_dtype != "int8":
        return x.astype(kv_dtype).astype(np.float32)  # [K_r, S, d]
    scale = np.abs(x).max(axis=-1, keepdims=True, initial=0) / np.float32(127)  # [K_r, S, 1]
    units = np.divide(x, scale, where=scale > 0, out=np.zeros_like(x))  # [K_r, S, d]
    return np.rint(units).astype(np.int8) * scale  # [K_r, S, d]


def scaled(x, factor):
    """Return the Expected of x times `factor`, any shape; the factor is first rounded to the dtype of x."""
    value = x.astype(np.float64) * factor
    lowp = x.astype(np.float32) * np.asarray(factor).astype(x.dtype).astype(np.float32)
    return Expected(value, rounded(lowp, x.dtype), np.abs(value))


def soft_cap(x, cap):
    """Return the Expected of cap tanh(x / cap) for float32, any shape."""
    inputs, x_scale = x, scale_of(x)
    x, x_lp = both(x)
    value, cap32 = oracle_ops.soft_cap(x, cap), np.float32(cap)
    lowp = np.tanh(x_lp.astype(np.float32) / cap32) * cap32
    slope = 1 - np.square(value / cap)  # the derivative by x, which multiplies the errors of x
    return Expected(value, lowp.astype(np.float64), np.hypot(value, slope * x_scale)).with_inputs(inputs)


def scores(q, k, mask, root, cap=None, sums=IN_FLOAT32):
    """Return the Expected of the scores: q [H_r, T, d], k [H_r, S, d], mask bool [T, S] -> [H_r, T, S].

    The keys are repeated for each query head. The scores are float32, and -inf where the mask is False.
    Products are divided by `root`, and soft-capped if `cap` is given.
    """
    if cap is not None:
        dots = scores(q, k, np.ones_like(mask), root, sums=sums)  # [H_r, T, S]
        capped = soft_cap(dots.not_recorded(np.float32), cap)  # [H_r, T, S]
        value, lowp = (np.where(mask, x, -np.inf) for x in (capped.value, capped.low_precision_reference))
        return replace(capped, value=value, low_precision_reference=lowp)
    inputs = q, k
    (q, q_lp), (k, k_lp) = both(q), both(k)  # [H_r, T, d], [H_r, S, d]
    value = oracle_ops.scores(q, k, mask, root)  # [H_r, T, S]
    root = np.float32(root)
    dots = sums.matmul(q_lp, k_lp.transpose(0, 2, 1))  # [H_r, T, S]
    lowp = np.where(mask, dots / root, -np.inf)  # [H_r, T, S]
    squares = np.matmul(np.square(q, dtype=np.float64), np.square(k, dtype=np.float64).transpose(0, 2, 1))
    unmasked = np.where(mask, value, 0) * float(root)  # [H_r, T, S]
    scale = scale_of_sum(unmasked, squares) / root  # [H_r, T, S]
    terms = q.shape[-1]
    found = Expected(value, lowp.astype(np.float64), scale, terms=terms, blocks=sums.blocks(terms))
    return found.with_inputs(*inputs)


def softmax(x):
    """Return the Expected of the softmax over the last axis, in float32: [H_r, T, S] -> [H_r, T, S]."""
    inputs, x_scale = x, scale_of(x)
    x, x_lp = both(x)  # [H_r, T, S] each
    value = oracle_ops.softmax(x)  # [H_r, T, S]
    shifted = x_lp - np.max(x_lp, axis=-1, keepdims=True)  # [H_r, T, S]
    terms = np.exp(shifted)  # [H_r, T, S]
    lowp = terms / np.sum(terms, axis=-1, keepdims=True)  # [H_r, T, S]
    # The relative rounding error of e^(s - max) is proportional to |s - max|. The error of a score that was
    # not recorded becomes a relative error of its probability; it may be large if all scores are.
    own = value * (1 + np.where(np.isfinite(shifted), -shifted, 0))  # [H_r, T, S]
    scale = np.hypot(own, value * x_scale)  # [H_r, T, S]
    return Expected(value, lowp.astype(np.float64), scale, common=(-1,)).with_inputs(inputs)


def context(probs, v):
    """Return the Expected of the context: probs float32 [H_r, T, S], v [H_r, S, d] -> [T, H_r * d].

    The values are repeated for each query head.
    """
    inputs, dtype = (probs, v), v.dtype
    (probs, probs_lp), (v, v_lp) = both(probs), both(v)  # [H_r, T, S], [H_r, S, d]
    value = oracle_ops.context(probs, v)  # [T, H_r * d]
    lowp = np.concatenate(IN_FLOAT32.matmul(probs_lp.astype(dtype), v_lp), axis=-1)  # [T, H_r * d]
    squares = np.matmul(np.square(probs, dtype=np.float64), np.square(v, dtype=np.float64))  # [H_r, T, d]
    scale = scale_of_sum(value, np.concatenate(squares, axis=-1))  # [T, H_r * d]
    return Expected(value, rounded(lowp, dtype), scale, terms=v.shape[1]).with_inputs(*inputs)


def geglu(gate, up):
    """Return the Expected of gelu(gate) * up: gate and up [T, F_r] -> [T, F_r]."""
    inputs, gate_scale, up_scale = (gate, up), scale_of(gate), scale_of(up)
    (gate, gate_lp), (up, up_lp) = both(gate), both(up)  # [T, F_r] each
    value = oracle_ops.geglu(gate, up)  # [T, F_r]
    g, u = gate_lp.astype(np.float32), up_lp.astype(np.float32)  # [T, F_r] each
    cube = np.float32(0.044715) * g * g * g  # [T, F_r]
    lowp = g * np.float32(0.5) * (1 + np.tanh(np.float32((2 / np.pi) ** 0.5) * (g + cube))) * u  # [T, F_r]
    # The sum 1 + tanh(..) has the rounding error of 1, even if the sum itself is small.
    # The errors of gate and up are multiplied by the derivatives: gelu'(x) <= 1.13, and |gelu(x)| <= |x|.
    g, u = np.abs(gate, dtype=np.float64), np.abs(up, dtype=np.float64)  # [T, F_r] each
    scale = np.sqrt(np.square(g * u) + np.square(1.13 * gate_scale * u) + np.square(g * up_scale))
    return Expected(value, rounded(lowp, gate_lp.dtype), scale).with_inputs(*inputs)


def swiglu(gate, up):
    """Return the Expected of silu(gate) * up: gate and up [T, F_r] -> [T, F_r]."""
    inputs, gate_scale, up_scale = (gate, up), scale_of(gate), scale_of(up)
    (gate, gate_lp), (up, up_lp) = both(gate), both(up)  # [T, F_r] each
    value = oracle_ops.swiglu(gate, up)  # [T, F_r]
    g = gate_lp.astype(np.float32)  # [T, F_r]
    with np.errstate(over="ignore"):
        lowp = g / (1 + np.exp(-g)) * up_lp.astype(np.float32)  # [T, F_r]
    # The errors of gate and up are multiplied by the derivatives: silu'(x) <= 1.1, and |silu(x)| <= |x|.
    # Code that limits exp(-x), so that it does not overflow in float32, keeps sigmoid(x) above some 1e-35.
    # The last term, times a roundoff of at least 6e-8, allows for that.
    g, u = np.abs(gate, dtype=np.float64), np.abs(up, dtype=np.float64)  # [T, F_r] each
    scale = np.sqrt(np.square(value) + np.square(1.1 * gate_scale * u) + np.square(g * up_scale))
    return Expected(value, rounded(lowp, gate_lp.dtype), scale + 1e-26 * g * u).with_inputs(*inputs)


def experts_act(x, chosen, gates, ups):
    """Return the Expected of SwiGLU of each token's experts: x [T, D], chosen bool [T, E] -> [T, X, F_r].

    `gates` and `ups` have a matrix [F_r, D] for each expert. The gate and up projections are not recorded.
    """
    hidden = [_experts_linear(x, chosen, weights).not_recorded(x.dtype) for weights in (gates, ups)]
    return swiglu(*hidden)  # [T, X, F_r]


def _experts_linear(x, chosen, weights):
    """Return the Expected of a projection of each token's experts: x [T, D], chosen [T, E] -> [T, X, F_r].

    `weights` has a matrix [F_r, D] for each expert.
    """
    shape = (len(x), int(chosen[0].sum()), len(weights[0]))
    value, lowp, scale = np.empty(shape), np.empty(shape), np.empty(shape)  # [T, X, F_r] each
    nth = np.cumsum(chosen, axis=1) - 1  # [T, E]
    for expert, w in enumerate(weights):
        rows = np.flatnonzero(chosen[:, expert])  # [n]
        y, at = linear(x[rows], w), (rows, nth[rows, expert])  # [n, F_r]
        value[at], lowp[at], scale[at] = y.value, y.low_precision_reference, y.scale
    return Expected(value, lowp, scale, terms=x.shape[1]).with_inputs(x)


def experts_sum(acts, router, per_token, normalized, downs):
    """Return the Expected of the experts' weighted sum: acts [T, X, F_r], router [T, E] -> [T, D].

    The router's logits determine each token's X = `per_token` experts and their weights, which are a softmax
    over these experts if they are `normalized`, otherwise over all. `downs` has a matrix [D, F_r] for each
    expert.
    """
    inputs = acts
    acts, acts_lp = both(acts)  # [T, X, F_r] each
    chosen = oracle_ops.choose_experts(router, per_token)  # [T, E]
    router_weights = oracle_ops.route(router, per_token, normalized)  # [T, E]
    shifted = np.where(chosen | (not normalized), router.astype(np.float32), -np.inf)  # [T, E]
    shifted -= shifted.max(axis=-1, keepdims=True)
    weights_lp = np.exp(shifted) / np.exp(shifted).sum(axis=-1, keepdims=True)  # [T, E]
    shape = (len(acts), len(downs[0]))
    value, lowp, squares = np.zeros(shape), np.zeros(shape, np.float32), np.zeros(shape)  # [T, D] each
    nth = np.cumsum(chosen, axis=1) - 1  # [T, E]
    for expert, w in enumerate(downs):
        rows = np.flatnonzero(chosen[:, expert])  # [n]
        act, weight = acts[rows, nth[rows, expert]], router_weights[rows, expert, None]  # [n, F_r], [n, 1]
        y = oracle_ops.linear(act, w)  # [n, D]
        value[rows] += weight * y
        act_lp = acts_lp[rows, nth[rows, expert]]  # [n, F_r]
        lowp[rows] += weights_lp[rows, expert, None] * IN_FLOAT32.matmul(act_lp, w.T)
        y_squares = np.square(act, dtype=np.float64) @ np.square(w.T, dtype=np.float64)  # [n, D]
        # A weight has the relative rounding error of a softmax, and all elements of its row share that error.
        weight_scale = 1 - shifted[rows, expert, None].astype(np.float64)  # [n, 1], relative to the weight
        squares[rows] += np.square(weight) * (y_squares + np.square(weight_scale * y))
    terms = acts.shape[1] * acts.shape[2]
    scale = scale_of_sum(value, squares)  # [T, D]
    found = Expected(value, rounded(lowp, acts_lp.dtype), scale, terms=terms, common=(-1,))
    return found.with_inputs(inputs)


def concatenated(parts):
    """Return the Expected of the ranks' columns, one after another, from that of each rank."""
    arrays = [(part.value, part.low_precision_reference, part.scale) for part in parts]
    value, lowp, scale = (np.concatenate(each, axis=-1) for each in zip(*arrays, strict=True))  # [n, V] each
    return replace(parts[0], value=value, low_precision_reference=lowp, scale=scale)


def total(parts, bias=None, rounds_each=False):
    """Return the Expected of the sum over the ranks, plus the bias once: parts [T, D], bias [D] -> [T, D].

    16-bit terms are summed in float32, unless the engine rounds after each addition (`rounds_each`). The
    low-precision reference rounds the sum before it adds the bias, because an all-reduce returns a rounded
    sum.
    """
    inputs = parts
    parts, lowps = zip(*map(both, parts), strict=True)  # [T, D] each
    dtype = lowps[0].dtype
    terms = [*parts, np.zeros_like(parts[0][0]) if bias is None else bias]  # [T, D] each, and [D]
    value = sum(term.astype(np.float64) for term in terms)  # [T, D]
    lowp = lowps[0].astype(np.float32)  # [T, D]
    for part in lowps[1:]:
        lowp = lowp + part.astype(np.float32)  # [T, D]
        lowp = lowp.astype(dtype).astype(np.float32) if rounds_each else lowp  # [T, D]
    lowp = rounded(lowp, dtype)  # [T, D]
    if bias is not None:
        lowp = rounded(lowp.astype(np.float32) + bias.astype(np.float32), dtype)  # [T, D]
    scale = scale_of_sum(value, sum(np.square(term, dtype=np.float64) for term in terms))  # [T, D]
    return Expected(value, lowp, scale, terms=len(terms)).with_inputs(*inputs)


def add(x, y, multiplier=1):
    """Return the Expected of x + multiplier * y, two arrays of the same shape.

    The low-precision reference rounds the product before the addition, to the dtype of y.
    """
    inputs = x, y
    (x, x_lp), (y, y_lp) = both(x), both(y)
    value = x.astype(np.float64) + multiplier * y.astype(np.float64)
    term = (np.float32(multiplier) * y_lp.astype(np.float32)).astype(y_lp.dtype)
    lowp = rounded(x_lp.astype(np.float32) + term.astype(np.float32), x_lp.dtype)
    return Expected(value, lowp, np.abs(value)).with_inputs(*inputs)
