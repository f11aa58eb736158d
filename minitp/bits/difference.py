"""The difference between the bits of two arrays, and how it compares with a rounding error."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

ROUNDINGS, SUM_ERRORS = 4, 64  # factors of the two terms in `BitDifference.excess`
BLOCK = 2**18  # elements that are compared in float64 at a time, at least one row


@dataclass(frozen=True)
class BitDifference:
    """The difference between an array of a run, b, and that of another run, a.

    Attributes
    ----------
    elements, size : int
        The number of elements whose bits differ, and of all elements.
    index : tuple of int
        The index of the largest difference.
    a_value, b_value : float
        The two values there.
    ulps : int or None
        Their distance in units in the last place, which counts the floating-point numbers from one to the
        other; None if one of them is not finite, or for integers.
    excess : float
        The largest |b - a|, relative to the error that another order of a sum may cause:

            8 u (|x| + c) + 64 u32 sqrt(m) c

        Here x is the element, c the root mean square of its row, m the number of terms in the sum, and u the
        unit roundoff of the arrays' dtype; u32 is that of float32, or u if it is smaller. The factors are
        larger than one sum needs, because c only estimates the size of the terms, and because a few
        operations in a row may enlarge an error. More than 1 is probably a different computation. Infinite
        for integers.
    """

    elements: int
    size: int
    index: tuple
    a_value: float
    b_value: float
    ulps: int | None
    excess: float

    @property
    def only_zeros(self):
        """True if only the signs of zeros differ."""
        return self.ulps == 0


def bits_of(array):
    """Return a view of an array as unsigned integers of the same width."""
    array = np.ascontiguousarray(array)
    return array.view(f"u{array.itemsize}")


def differing(a, b):
    """Return where the bits of two arrays of the same shape and dtype differ, a bool array.

    NaN equals NaN if the bits are the same, and -0.0 differs from 0.0.
    """
    return bits_of(a) != bits_of(b)


def bit_difference(a, b, terms=1):
    """Return the BitDifference of two arrays of the same shape and dtype, of which some bits differ.

    `terms` is the number of terms in the sum that gives an element.
    """
    width = max(1, a.shape[-1]) if a.ndim else 1
    rows = [array.reshape(-1, width) for array in (a, b)]  # [R, width] each
    step = max(1, BLOCK // width)
    elements, excess, largest, at = 0, 0.0, -np.inf, 0
    for start in range(0, len(rows[0]), step):
        count, worst, apart, index = _block_difference(*(each[start : start + step] for each in rows), terms)
        elements, excess = elements + count, max(excess, worst)
        if apart > largest:
            largest, at = apart, start * width + index
    x, y = (each[divmod(at, width)] for each in rows)
    ulps = None
    if np.isfinite(largest) and a.dtype.kind not in "biu":
        ulps = abs(_ordinal(x) - _ordinal(y))
    index = tuple(map(int, np.unravel_index(at, a.shape)))
    return BitDifference(elements, rows[0].size, index, float(x), float(y), ulps, excess)


def _block_difference(a, b, terms):
    """Return the number of differing elements, the excess, and the largest difference and its flat index."""
    where = differing(a, b)  # [R, n]
    x, y = (array.astype(np.float64) for array in (a, b))  # [R, n]
    with np.errstate(all="ignore"):
        apart = np.abs(y - x)  # [R, n]
        apart[~np.isfinite(apart)] = np.inf
        apart[~where] = -1.0  # also where both are infinite
        index = int(apart.argmax())
        excess = np.inf if where.any() else 0.0  # no integer is rounded
        if a.dtype.kind not in "biu":
            excess = float((apart / _rounding(x, y, a.dtype, terms)).max(where=where, initial=0.0))
    return int(where.sum()), excess, apart.flat[index], index


def _rounding(x, y, dtype, terms):
    """Return the error of each element that another order of its sum may cause; see `excess`."""
    u = float(ml_dtypes.finfo(dtype).eps) / 2
    u32 = min(u, 2.0**-24)
    largest = np.maximum(np.abs(x), np.abs(y))
    finite = np.where(np.isfinite(largest), largest, 0.0)
    count = np.maximum(np.count_nonzero(finite, axis=-1, keepdims=True), 1)
    c = np.sqrt(np.square(finite).sum(axis=-1, keepdims=True) / count)  # root mean square of each row
    tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    return 2 * ROUNDINGS * u * (finite + c) + SUM_ERRORS * u32 * terms**0.5 * c + tiny


def _ordinal(value):
    """Return the number of a floating-point number among those of its dtype, 0 for both zeros."""
    bits = int(bits_of(np.asarray(value)[None])[0])
    sign = 1 << (8 * value.dtype.itemsize - 1)
    return -(bits - sign) if bits & sign else bits
