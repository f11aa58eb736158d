"""The tolerance of a check: how far a recorded array may be from its expected value.

The shapes, the dtypes and the positions of NaN and infinite entries are compared first (see `rank` and
`difference`); the bounds apply to the finite entries. The symbols, for one array of a run:

    x   the array that the rank recorded
    y   the expected value: the oracle's operation, in float64, on the inputs that the rank recorded
    r   the low-precision reference: the same formula with sums in float32, rounded to the dtype of x
    c   the scale, a number per element: the root of the sum of the squares of the result and of the terms
        that are added up
    m   the number of terms in a sum
    b   the number of blocks in which a tensor core adds these terms; 0 on a CPU
    n   the number of samples: elements whose errors are independent
    u   the unit roundoff of the dtype of x: 2^-24 (float32), 2^-11 (float16), 2^-8 (bfloat16); u32 = 2^-24
    s   the error of one sum in units of c: 2 u + u32 (sqrt(m) + b)

The array passes if it meets both bounds:

    ||x - y||   <=  2 ||r - y||   + s ||c|| / sqrt(n)
    max|x - y|  <=  2 max|r - y|  + s max(c)

The first term is the rule of flash-attention's tests: r has the error that is unavoidable in this dtype, and
x may have twice as much. The second term is needed for small arrays, because ||r - y|| may be small by
chance. Rounding errors are proportional to c, even where the terms of a sum cancel, and the error of one sum
is about s c: one or two roundings of the result (2 u), a random walk of m roundings in float32
(u32 sqrt(m)), and on tensor cores a rounding per block, all of them toward zero (u32 b). The norm of n
independent errors of this size is about s ||c||, and it varies by chance by about s ||c|| / sqrt(n). For
large n this is small, and only the factor 2 remains.

Not every element is a sample. A few elements may be far larger than the rest and determine the norm, so
n = (sum c^2)^2 / (sum c^4), which is the number of elements if all have the same size. Positions with the
same token have nearly the same numbers and errors, so n is divided by the average number of times that a
token occurs. Positions may also be equal for another reason, such as weights that are nearly zero; then n is
divided by the number of positions that equal a typical one. If most elements are equal, n is at most the
number of different values.

A worked example, a product of four terms in float16 (u = 4.9e-4). W is rounded to float16 first, so 0.3 is
0.30005:

    x_in = [1, -2, 0.5, 3]       W = [[0.3, 0.7, 0.2, 0.9], [0.1, 0.2, 0.3, 0.4], [-0.5, 0.6, 0.1, 0.2]]

    y = [1.69934, 1.04980, -1.05035]             ||y|| = 2.257
    r = [1.69922, 1.04980, -1.05078]             ||r - y|| = 4.4e-4
    c = [3.498, 1.653, 1.777]                    ||c|| = 4.258; c_0^2 = 1.7^2 + 0.3^2 + 1.4^2 + 0.1^2 + 2.7^2
    m = 4, b = 0, s = 9.8e-4, n = 2.0            n < 3: the first element is larger than the other two

    relative bound: (2 * 4.4e-4 + 9.8e-4 * 4.258 / sqrt(2.0)) / 2.257 = 1.7e-3

An engine that rounds every partial sum to float16 gets [1.69824, 1.04980, -1.05078]. Its relative error is
5.2e-4, 31% of the bound. An engine that leaves out the smallest term of the first element, 0.1, gets
1.59961 there. Its relative error is 4.4e-2, which is 26 times the bound.

A fused kernel does not record its inner steps. An input that it does not record is a NotRecorded: y and r
each use their own value of it, so 2 ||r - y|| includes the roundings in between. Its errors vary by chance,
too, so the second term is added again with the roundings and samples of that input. For
SwiGLU and soft caps, c includes the scale of the input, which may be a sum whose terms cancel.
"""

from dataclasses import dataclass, replace
from functools import cache

import ml_dtypes
import numpy as np

from minitp.check.difference import norm


@dataclass(frozen=True)
class NotRecorded:
    """An input that the run did not record, because a fused kernel does not store it.

    Attributes
    ----------
    value : float64 array
        y, the oracle's value of this input.
    low_precision_reference : array
        r, the low-precision reference's value of this input, in the run's dtype.
    roundings : float
        The sum of the relative errors of this value and of the NotRecorded inputs on which it depends: s for
        each of them, in the dtype in which the run computes it.
    samples : float
        The smallest number of samples of this value and of those inputs.
    scale : float64 array
        c, the scale of this value.
    """

    value: np.ndarray
    low_precision_reference: np.ndarray
    roundings: float
    samples: float
    scale: np.ndarray

    @property
    def shape(self):
        return self.value.shape

    @property
    def dtype(self):
        return self.low_precision_reference.dtype

    def __len__(self):
        return len(self.value)

    def __getitem__(self, index):
        """Return a part of this value."""
        arrays = self.value[index], self.low_precision_reference[index], self.scale[index]
        samples = max(1.0, self.samples * min(1, arrays[0].size / max(1, self.value.size)))
        return NotRecorded(arrays[0], arrays[1], self.roundings, samples, arrays[2])


def both(x):
    """Return the values of an input for the oracle and for the low-precision reference, (y, r).

    They differ only if the input was not recorded.
    """
    return (x.value, x.low_precision_reference) if isinstance(x, NotRecorded) else (x, x)


def concatenated(parts, axis):
    """Return arrays one after another, as an array, or as a NotRecorded if one of them was not recorded."""
    hidden = [part for part in parts if isinstance(part, NotRecorded)]
    if not hidden:
        return np.concatenate(parts, axis)
    values, lowps = zip(*map(both, parts), strict=True)
    scales = [np.broadcast_to(scale_of(part), part.shape) for part in parts]
    value, lowp, scale = (np.concatenate(each, axis) for each in (values, lowps, scales))
    roundings, samples = max(part.roundings for part in hidden), min(part.samples for part in hidden)
    return NotRecorded(value.astype(np.float64), lowp, roundings, samples, scale)


def scale_of(x):
    """Return the scale of an input that was not recorded, whose errors an operation passes on; else 0."""
    return x.scale if isinstance(x, NotRecorded) else 0.0


@dataclass(frozen=True)
class Expected:
    """The expected value of a step, and the quantities from which its bounds are computed.

    Attributes
    ----------
    value : float64 array
        y, the value that the oracle computes.
    low_precision_reference : float64 array or None
        r, of the same shape; None if the recorded array must equal `value` exactly.
    scale : float64 array or None
        c, the scale of each element; of the same shape.
    terms : int
        m, the number of terms in the sum that gives an element.
    blocks : int
        b, the number of blocks of that sum on a tensor core; 0 elsewhere (see `TensorCoreSums.blocks`).
    common : tuple of int
        Axes along which the elements share most of their error, so that they count as one sample.
    roundings, samples : float
        The sum of the roundings and the smallest number of samples of the inputs that are NotRecorded.
    """

    value: np.ndarray
    low_precision_reference: np.ndarray | None = None
    scale: np.ndarray | None = None
    terms: int = 1
    blocks: int = 0
    common: tuple = ()
    roundings: float = 0.0
    samples: float = 1.0

    def bounds(self, dtype, repeats=1):
        """Return the largest relative and the largest absolute error allowed in `dtype`.

        `repeats` is the average number of times that a token occurs.
        """
        if self.low_precision_reference is None:
            return 0.0, 0.0
        y, r, c2 = self.value, self.rounded_reference(dtype), np.square(self.scale)
        finite = np.isfinite(y) & np.isfinite(r)
        if not finite.any():
            return 0.0, 0.0
        equal_rows = _equal_rows(r)
        if not finite.all():  # an overflow must not widen the bound
            c2[~finite] = 0.0
            y, r = y[finite], r[finite]
        norm_y = norm(y)
        off = np.abs(r - y)
        s = self._error_of_one_sum(dtype)
        n = _participation(c2.sum(axis=self.common)) / max(repeats, equal_rows)
        n = max(1, min(n, _different_values(y.reshape(-1))))
        chance = s / n**0.5 + self.roundings / max(1, self.samples / repeats) ** 0.5
        relative = 2 * norm(off) + chance * c2.sum() ** 0.5
        relative = relative / norm_y if norm_y else np.inf  # if y is zero, only the absolute bound applies
        largest = 2 * off.max() + (s + self.roundings) * c2.max() ** 0.5
        return float(relative), float(largest)

    def not_recorded(self, dtype):
        """Return this value as a NotRecorded input of the next operation, computed by the run in `dtype`."""
        samples = _participation(np.square(self.scale).sum(axis=self.common))
        samples = min(samples, self.samples) if self.roundings else samples
        roundings = self.roundings + self._error_of_one_sum(dtype)
        lowp = self.low_precision_reference.astype(dtype)
        return NotRecorded(self.value, lowp, roundings, samples, self.scale)

    def rounded_reference(self, dtype):
        """Return r, rounded to `dtype`, in float64."""
        return rounded(self.low_precision_reference, dtype)

    def effective_elements(self):
        """Return the effective number of elements, each of which is rounded by itself."""
        return _participation(np.square(self.scale))

    def with_inputs(self, *inputs):
        """Return a copy that includes the roundings of those `inputs` that are NotRecorded."""
        hidden = [x for x in inputs if isinstance(x, NotRecorded)]
        if not hidden:
            return self
        roundings, samples = sum(x.roundings for x in hidden), min(x.samples for x in hidden)
        return replace(self, roundings=roundings, samples=samples)

    def divided(self, divisor):
        """Return the Expected of this value divided by `divisor` in float32."""
        r = self.low_precision_reference.astype(np.float32) / np.float32(divisor)
        return self._with_arrays(self.value / divisor, r.astype(np.float64), self.scale / divisor)

    def as_heads(self, head_dim):
        """Return a copy whose arrays are [n, T, d] instead of [T, n * d]."""
        arrays = self.value, self.low_precision_reference, self.scale
        return self._with_arrays(*(x.reshape(len(x), -1, head_dim).transpose(1, 0, 2) for x in arrays))

    def _error_of_one_sum(self, dtype):
        """Return s, in units of the scale."""
        return 2 * roundoff(dtype) + roundoff(np.float32) * (self.terms**0.5 + self.blocks)

    def _with_arrays(self, value, low_precision_reference, scale):
        return replace(self, value=value, low_precision_reference=low_precision_reference, scale=scale)


@dataclass(frozen=True)
class Stored(Expected):
    """The expected content of a cache whose dtype is smaller than the run's; `value` is what was written.

    Attributes
    ----------
    read : array
        The numbers that the run should read, bit for bit.
    allowed : float64 array
        The largest error of each element if the bits differ.
    """

    read: np.ndarray | None = None
    allowed: np.ndarray | None = None

    def bounds(self, dtype, repeats=1):
        """Return the largest relative and the largest absolute error allowed, which follow from `allowed`."""
        norm_y = norm(self.value)
        relative = norm(self.allowed) / norm_y if norm_y else 0.0
        return float(relative), float(self.allowed.max(initial=0.0))

    def first_outside(self, x):
        """Return the index of the first element of x whose error exceeds its own bound, or None."""
        outside = np.argwhere(~(np.abs(x.astype(np.float64) - self.value) <= self.allowed))
        return tuple(map(int, outside[0])) if len(outside) else None


def _participation(squares):
    """Return (sum q)^2 / sum q^2, the effective number of elements in the sum: [..] -> float."""
    total = squares.sum()
    return float(total**2 / np.square(squares).sum()) if total else 1.0


def _equal_rows(array, most=16):
    """Return how many rows [n] of an array [.., n] equal a typical row, itself included, as a float.

    Rows are compared column by column, and large columns count more. Of a wide array, `most` columns are a
    sufficient sample.
    """
    rows = array.reshape(-1, array.shape[-1] if array.ndim else 1)  # [rows, n]
    if len(rows) < 2 or not rows.shape[1]:
        return 1.0
    columns = rows[:, :: -(-rows.shape[1] // most)]  # [rows, columns]
    columns = np.where(np.isfinite(columns), columns, 0.0).T  # [columns, rows]
    columns.sort()
    squares = np.square(columns).sum(axis=1)  # [columns]
    begins = np.ones(columns.shape, dtype=bool)  # [columns, rows]: whether a group of equal values begins
    begins[:, 1:] = columns[:, 1:] != columns[:, :-1]
    starts = np.flatnonzero(begins)  # [groups]
    sizes = np.append(starts[1:], begins.size) - starts  # [groups]
    equal = np.bincount(starts // len(rows), weights=sizes**2) / len(rows)  # [columns]
    return float(equal.dot(squares) / squares.sum()) if squares.any() else 1.0


def _different_values(values, most=4096):
    """Return the number of different values, to 7 digits, if most are equal; else infinity: [n] -> float.

    Of a long array, `most` values are a sufficient sample.
    """
    sample = values[:: max(1, len(values) // most)].astype(np.float32)
    different = len(np.unique(sample))
    return different if different < len(sample) / 2 else np.inf


@cache
def roundoff(dtype):
    """Return u, the unit roundoff of a dtype."""
    return float(ml_dtypes.finfo(dtype).eps) / 2


def rounded(x, dtype):
    """Round x to the dtype and return it as float64, in which errors are measured; overflow gives inf."""
    with np.errstate(over="ignore"):
        return x.astype(dtype).astype(np.float64)
