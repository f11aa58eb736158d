"""The difference between two arrays, as a relative and an absolute error."""

import math
from dataclasses import dataclass

import numpy as np

WORST = 3  # number of elements in Difference.worst


@dataclass(frozen=True)
class Difference:
    """The difference between an array and its expected value.

    Attributes
    ----------
    relative : float
        ||value - expected|| / ||expected||, over the elements that are finite in both; inf if an element is
        NaN or infinite in only one of them, or if `expected` is zero and `value` is not.
    absolute : float
        The largest |value - expected|; inf in the same cases.
    worst : list of (index, value, expected)
        The elements with the largest differences, the largest first.
    """

    relative: float
    absolute: float
    worst: list

    @property
    def index(self):
        """The index of the largest difference, a tuple of int."""
        return self.worst[0][0]

    def __str__(self):
        if not self.worst:
            return "empty"
        index, value, expected = self.worst[0]
        place = ", ".join(map(str, index))
        # as many digits as it takes for two numbers that differ to look different
        texts = [(f"{value:.{digits}g}", f"{expected:.{digits}g}") for digits in (6, 9, 17)]
        value, expected = next((pair for pair in texts if pair[0] != pair[1]), texts[0])
        return f"relative error {self.relative:.2g}; at [{place}] it is {value}, expected {expected}"


def difference_of(value, expected):
    """Return the Difference of two arrays of the same shape, infinite unless NaN and infinities agree."""
    if value.size == 0:
        return Difference(0.0, 0.0, [])
    if same_bits(value, expected):
        first = (0,) * value.ndim
        return Difference(0.0, 0.0, [(first, float(value[first]), float(expected[first]))])
    value, expected = value.astype(np.float64, copy=False), expected.astype(np.float64, copy=False)
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(value - expected)
        if np.isfinite(apart).all():
            size, off = norm(expected), norm(apart)
        else:
            finite = np.isfinite(value) & np.isfinite(expected)
            same = (value == expected) | (np.isnan(value) & np.isnan(expected))
            apart = np.where(finite, apart, np.where(same, 0.0, np.inf))
            size, off = norm(expected[finite]), norm(apart)
    relative = off / size if size else (np.inf if off else 0.0)
    worst = []
    for i in _largest(apart.reshape(-1)):
        index = tuple(map(int, np.unravel_index(i, apart.shape)))
        worst.append((index, float(value[index]), float(expected[index])))
    return Difference(float(relative), float(apart[worst[0][0]]), worst)


def _largest(errors):
    """Return the indices of the `WORST` largest errors, the largest first: [n] -> a sequence of int."""
    infinite = np.flatnonzero(errors == np.inf)[:WORST]
    if infinite.size:
        return infinite
    found = (-errors).argpartition(min(WORST, errors.size) - 1)[:WORST].tolist()
    return sorted(found, key=lambda i: (-errors[i], i))


def norm(x):
    """Return ||x||, also if the squares are too large or too small for float64.

    NumPy may warn of an overflow.
    """
    x = x.reshape(-1)
    squares = float(x.dot(x))
    if 1e-200 < squares < 1e200:
        return math.sqrt(squares)
    largest = float(np.abs(x).max(initial=0.0))
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * float(np.linalg.norm(x / largest))


def same_bits(a, b):
    """Return whether two arrays of the same shape have the same dtype and the same bits."""
    if a.dtype != b.dtype:
        return False
    bits = f"u{a.itemsize}"
    return bool(np.array_equal(a.view(bits), b.view(bits)))
