"""What an operation should give for the inputs that a rank really had, and how far off it may be.

Each function here computes an operation twice: by the oracle in float64, and by a third implementation, the
same formula with its result rounded to the dtype at hand and sums in float32. That is the least that can be
asked for in this dtype, and an engine may be twice as far off (after flash-attention's tests):

    ||x - value||  <=  2 ||third - value||  +  s ||scale|| / sqrt(samples)
    max|x - value| <=  2 max|third - value| +  s max(scale)

The second term is there because an error measured on few numbers may be small by luck. `scale` is, for each
number, the size that its sum would have if the signs of its terms were random: rounding errors are in
proportion to it, even where the terms cancel. `s` is the error of one such sum in these units: a rounding or
two of the result and a random walk of `terms` roundings in float32, 2 u + u32 sqrt(terms), with u the unit
roundoff of the result's dtype (2^-24, 2^-11, 2^-8 for float32, float16, bfloat16). A norm over `samples`
independent errors is known to 1 / sqrt(samples) of that, so for arrays of some size only the factor of two
remains.

The numbers in an array are not all samples. A few that are far larger than the rest make the norm by
themselves (in a hidden state one may be ten times all others together), so samples = (sum scale^2)^2 /
sum scale^4, which is the number of elements if all are of one size. And rows of the same token are much
alike, and so are their errors: this is divided by how often a token comes on average.

Where a run fuses operations, an input may be Unseen: then the oracle's chain and the third implementation's
each go on from what they had there, so that the bound grows with the roundings on the way; and the second
term comes once more for the Unseen, with its own roundings and samples: its luck is its own.

Shape letters as in `ops`; [n, T, d] are n heads.
"""

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from minitp import oracle_ops

BLOCK = 1 << 22  # weights in float64 at a time


@dataclass(frozen=True)
class Unseen:
    """An input that the run did not show.

    Attributes
    ----------
    value : float64 array
        The oracle's.
    third : array
        The third implementation's, in the run's dtype.
    roundings : float
        Of it and of what it came from, in units of 1: each two roundoffs.
    samples : float
        The fewest of them.
    """

    value: np.ndarray
    third: np.ndarray
    roundings: float
    samples: float


def both(x):
    """An input as (the oracle's, the third implementation's); one that was seen is the same for both."""
    return (x.value, x.third) if isinstance(x, Unseen) else (x, x)


@dataclass(frozen=True)
class Expected:
    """The oracle's `value`, the `third` implementation's, and the `scale` (see above): float64, one shape.

    With `third` None the value must be met exactly, bit for bit.

    Attributes
    ----------
    terms : int
        In the sum that makes a number.
    common : tuple of int
        Axes along which numbers have much of their error in common, and count as one sample.
    roundings, samples : float
        Those of its Unseen inputs together.
    """

    value: np.ndarray
    third: np.ndarray | None = None
    scale: np.ndarray | None = None
    terms: int = 1
    common: tuple = ()
    roundings: float = 0.0
    samples: float = 1.0

    def bounds(self, dtype, repeats=1):
        """The largest relative and absolute error allowed in `dtype`, if each token comes so often."""
        if self.third is None:
            return 0.0, 0.0
        finite = np.isfinite(self.value) & np.isfinite(self.third)  # an overflow allows nothing
        size = np.linalg.norm(self.value[finite])
        if size == 0:
            return 0.0, 0.0
        off = self.third[finite] - self.value[finite]
        slack = 2 * _roundoff(dtype) + _roundoff(np.float32) * self.terms**0.5
        squares = np.square(self.scale, where=finite, out=np.zeros_like(self.scale))
        samples = max(1, _participation(squares.sum(axis=self.common)) / repeats)
        luck = slack / samples**0.5 + self.roundings / max(1, self.samples / repeats) ** 0.5
        relative = (2 * np.linalg.norm(off) + luck * squares.sum() ** 0.5) / size
        largest = 2 * np.max(np.abs(off)) + (slack + self.roundings) * np.max(squares) ** 0.5
        return float(relative), float(largest)

    def unseen(self, dtype):
        """This as an input of the next operation, if the run has not shown what it had in `dtype`."""
        samples = _participation(np.square(self.scale).sum(axis=self.common))
        samples = min(samples, self.samples) if self.roundings else samples
        return Unseen(self.value, self.third.astype(dtype), self.roundings + 2 * _roundoff(dtype), samples)

    def of(self, *inputs):
        """The same, with what the Unseen among its inputs add."""
        unseen = [x for x in inputs if isinstance(x, Unseen)]
        if not unseen:
            return self
        roundings, samples = sum(x.roundings for x in unseen), min(x.samples for x in unseen)
        return replace(self, roundings=roundings, samples=samples)

    def divided(self, divisor):
        """The same of float32 numbers that are divided by this one."""
        value, scale = self.value / divisor, self.scale / divisor
        third = self.third.astype(np.float32) / np.float32(divisor)
        return replace(self, value=value, third=third.astype(np.float64), scale=scale)

    def as_heads(self, head_dim):
        """[T, n * d] as [n, T, d]."""

        def split(x):
            return x.reshape(len(x), -1, head_dim).transpose(1, 0, 2)

        return replace(self, value=split(self.value), third=split(self.third), scale=split(self.scale))


def _participation(squares):
    """(sum x)^2 / sum x^2: how many numbers make up the sum. [..] -> float"""
    total = squares.sum()
    return float(total**2 / np.square(squares).sum()) if total else 1.0


def _roundoff(dtype):
    return float(ml_dtypes.finfo(dtype).eps) / 2


def _rounded(x32, dtype):
    """float32 to the dtype and on to float64, in which errors are measured. Overflow gives inf, quietly."""
    with np.errstate(over="ignore"):
        return x32.astype(dtype).astype(np.float64)


def _product(a, b):
    """a @ b in float32, one term after the other: [.., n, m] @ [.., m, k] -> [.., n, k].

    Not BLAS, which the run itself may use: in which order that adds up differs from shape to shape, and by
    luck its error may be a fraction of what this plain sum has.
    """
    a, b = (np.ascontiguousarray(x, dtype=np.float32) for x in (a, b))
    return np.einsum("...nm,...mk->...nk", a, b)


def exactly(value):
    """Nothing but this: for copies and gathers."""
    return Expected(value)


def rms_norm(x, weight, eps):
    """[T, D], [D] -> [T, D]"""
    given = x
    x, x3 = both(x)  # [T, D] each
    value = oracle_ops.rms_norm(x, weight, eps)  # [T, D]
    x32, w32 = x3.astype(np.float32), weight.astype(np.float32)  # [T, D], [D]
    third = x32 / np.sqrt(np.mean(x32 * x32, axis=-1, keepdims=True) + np.float32(eps)) * w32  # [T, D]
    return Expected(value, _rounded(third, x3.dtype), np.abs(value), common=(-1,)).of(given)


def linear(x, weight, bias=None, dtype=None):
    """x W^T + b: [T, in], [out, in], [out] -> [T, out] in `dtype`, None for that of `x`."""
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
        third[:, out] = _rounded(_product(x3, w.T) + b.astype(np.float32), dtype or x3.dtype)
        scale[:, out] = squares @ np.square(w.T, dtype=np.float64) + np.square(b, dtype=np.float64)
    return Expected(value, third, np.sqrt(scale), terms=weight.shape[1]).of(given)


def rope(x, positions, inverse_frequencies, factor):
    """[n, T, d], int [T], float64 [d/2], number -> [n, T, d]. The third's angles are float32, as all are."""
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
    return Expected(value, _rounded(third, x3.dtype), scale, common=(0, 2)).of(given)


def scaled(x, factor):
    """x times a number that is rounded to the dtype of x first, any shape."""
    value = x.astype(np.float64) * factor
    third = x.astype(np.float32) * np.asarray(factor).astype(x.dtype).astype(np.float32)
    return Expected(value, _rounded(third, x.dtype), np.abs(value))


def soft_cap(x, cap):
    """cap tanh(x / cap) of float32, any shape."""
    given = x
    x, x3 = both(x)
    value, cap32 = oracle_ops.soft_cap(x, cap), np.float32(cap)
    third = np.tanh(x3.astype(np.float32) / cap32) * cap32
    return Expected(value, third.astype(np.float64), np.abs(value)).of(given)


def scores(q, k, mask, root, cap=None):
    """[H_r, T, d], each head's keys [H_r, S, d], bool [T, S] -> float32 [H_r, T, S], -inf where not seen.

    Products are divided by `root`, and then within `cap`, if there is one.
    """
    if cap is not None:
        capped = soft_cap(scores(q, k, np.ones_like(mask), root).unseen(np.float32), cap)  # [H_r, T, S]
        value, third = (np.where(mask, x, -np.inf) for x in (capped.value, capped.third))
        return replace(capped, value=value, third=third)
    value = oracle_ops.scores(q, k, mask, root)  # [H_r, T, S]
    root = np.float32(root)
    dots = _product(q, k.transpose(0, 2, 1))  # [H_r, T, S]
    third = np.where(mask, dots / root, -np.inf)  # [H_r, T, S]
    squares = np.matmul(np.square(q, dtype=np.float64), np.square(k, dtype=np.float64).transpose(0, 2, 1))
    scale = np.sqrt(squares) / root  # [H_r, T, S]
    return Expected(value, third.astype(np.float64), scale, terms=q.shape[-1])


def softmax(x):
    """float32 [H_r, T, S] -> float32 [H_r, T, S]"""
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
    """float32 [H_r, T, S], each head's values [H_r, S, d] -> [T, H_r * d]"""
    given = probs
    probs, probs3 = both(probs)  # [H_r, T, S] each
    value = oracle_ops.context(probs, v)  # [T, H_r * d]
    third = np.concatenate(_product(probs3.astype(v.dtype), v), axis=-1)  # [T, H_r * d]
    squares = np.matmul(np.square(probs, dtype=np.float64), np.square(v, dtype=np.float64))  # [H_r, T, d]
    scale = np.sqrt(np.concatenate(squares, axis=-1))  # [T, H_r * d]
    return Expected(value, _rounded(third, v.dtype), scale, terms=v.shape[1]).of(given)


def geglu(gate, up):
    """[T, F_r] twice -> [T, F_r]"""
    value = oracle_ops.geglu(gate, up)  # [T, F_r]
    g, u = gate.astype(np.float32), up.astype(np.float32)  # [T, F_r] each
    cube = np.float32(0.044715) * g * g * g  # [T, F_r]
    third = g * np.float32(0.5) * (1 + np.tanh(np.float32((2 / np.pi) ** 0.5) * (g + cube))) * u  # [T, F_r]
    # The sum 1 + tanh has roundings of 1, however small it is.
    scale = np.abs(g * u, dtype=np.float64)  # [T, F_r]
    return Expected(value, _rounded(third, gate.dtype), scale)


def swiglu(gate, up):
    """[T, F_r] twice -> [T, F_r]"""
    given = gate, up
    (gate, gate3), (up, up3) = both(gate), both(up)  # [T, F_r] each
    value = oracle_ops.swiglu(gate, up)  # [T, F_r]
    g = gate3.astype(np.float32)  # [T, F_r]
    with np.errstate(over="ignore"):
        third = g / (1 + np.exp(-g)) * up3.astype(np.float32)  # [T, F_r]
    return Expected(value, _rounded(third, gate3.dtype), np.abs(value)).of(*given)


def experts_act(x, chosen, gates, ups):
    """[T, D], bool [T, E], each expert's [F_r, D] twice -> [T, X, F_r]. Gates and ups are not seen."""
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
    """[T, X, F_r], float64 [T, E], each expert's [D, F_r] -> [T, D]"""
    shape = (len(acts), len(downs[0]))
    value, third, squares = np.zeros(shape), np.zeros(shape, np.float32), np.zeros(shape)  # [T, D] each
    places = np.cumsum(shares > 0, axis=1) - 1  # [T, E]
    for expert, w in enumerate(downs):
        rows = np.flatnonzero(shares[:, expert])  # [n]
        act, share = acts[rows, places[rows, expert]], shares[rows, expert, None]  # [n, F_r], [n, 1]
        value[rows] += share * oracle_ops.linear(act, w)
        third[rows] += share.astype(np.float32) * _product(act, w.T)
        terms = np.square(act, dtype=np.float64) @ np.square(w.T, dtype=np.float64)  # [n, D]
        squares[rows] += np.square(share) * terms
    terms = acts.shape[1] * acts.shape[2]
    return Expected(value, _rounded(third, acts.dtype), np.sqrt(squares), terms=terms)


def total(parts, bias=None):
    """The sum of the ranks' [T, D], and a bias [D] once: [T, D]. 16-bit terms are summed in float32.

    The third rounds the sum as an all-reduce must, before the bias comes to it.
    """
    given = parts
    parts, thirds = zip(*map(both, parts), strict=True)  # [T, D] each
    dtype = thirds[0].dtype
    terms = [*parts, np.zeros_like(parts[0][0]) if bias is None else bias]  # [T, D] each, and [D]
    value = sum(term.astype(np.float64) for term in terms)  # [T, D]
    third = _rounded(sum(part.astype(np.float32) for part in thirds), dtype)  # [T, D]
    if bias is not None:
        third = _rounded(third.astype(np.float32) + bias.astype(np.float32), dtype)  # [T, D]
    scale = np.sqrt(sum(np.square(term, dtype=np.float64) for term in terms))  # [T, D]
    return Expected(value, third, scale, terms=len(terms)).of(*given)


def add(x, y, multiplier=1):
    """x + multiplier y, of one shape. The third rounds the product before it is added."""
    given = x, y
    (x, x3), (y, y3) = both(x), both(y)
    value = x.astype(np.float64) + multiplier * y.astype(np.float64)
    term = (np.float32(multiplier) * y3.astype(np.float32)).astype(x3.dtype)
    third = _rounded(x3.astype(np.float32) + term.astype(np.float32), x3.dtype)
    return Expected(value, third, np.abs(value)).of(*given)
