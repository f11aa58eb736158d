"""The pictures of two arrays and of their difference that a report shows.

An array is seen as a matrix: its last axis across, all others down. The matrix is divided into at most
48 x 64 blocks. Each block shows its element of the largest magnitude, so nothing that differs is lost.
"""

from dataclasses import dataclass

import numpy as np

ROWS, COLUMNS = 48, 64  # largest size of a picture
LOWEST, STEPS = -10, 20  # code 1 of a difference is 1e-10 of A's root mean square; codes in a factor of ten
NOT_FINITE = -128  # code of NaN and infinities in A and B
DIFFERENT = 255  # code of a difference that is not finite
BRIGHT = 99  # percentile of the magnitudes that has the brightest color
FIRST, NEAR = 20, 2  # differing steps that always have a picture, and as many steps before and after each
LIMIT = 1_500_000  # bytes of all other pictures together


@dataclass(frozen=True)
class Picture:
    """Two arrays and their difference, reduced to a few blocks.

    Attributes
    ----------
    shape : tuple of int
        The shape of the arrays.
    scale : float
        The value with code 127; larger ones have it, too.
    rms : float
        The root mean square of A's finite elements, the unit of the differences.
    a, b : int8 [rows, columns]
        127 x / `scale`, rounded, or NOT_FINITE.
    difference : uint8 [rows, columns]
        0 for no difference, 1 + 20 (log10(|b - a| / `rms`) + 10) within 1 .. 254, or DIFFERENT.
    """

    shape: tuple
    scale: float
    rms: float
    a: np.ndarray
    b: np.ndarray
    difference: np.ndarray


def picture(a, b):
    """Return the Picture of two float64 arrays of the same shape, or None if they are empty."""
    if not a.size:
        return None
    shape = a.shape
    a, b = (x.reshape(-1, shape[-1] if shape else 1) for x in (a, b))  # [R, C]
    rows, columns = _starts(a.shape[0], ROWS), _starts(a.shape[1], COLUMNS)
    squares, count, blocks = 0.0, 0, ([], [], [])
    for start, stop in zip(rows, [*rows[1:], a.shape[0]], strict=True):  # a row of blocks at a time
        strips = a[start:stop], b[start:stop]
        finite = strips[0][np.isfinite(strips[0])]
        squares, count = squares + float(np.vdot(finite, finite)), count + finite.size
        for strip, found in zip((*strips, _apart(*strips)), blocks, strict=True):
            found.append(_extreme(strip, columns))
    a, b, apart = map(np.array, blocks)  # [rows, columns] each
    shown = np.abs(np.stack((a, b)))
    shown = shown[np.isfinite(shown)]
    scale = float(np.percentile(shown, BRIGHT)) or float(shown.max()) if shown.size else 0.0
    rms = (squares / count) ** 0.5 if count else 0.0
    scale, rms = scale or 1.0, rms or 1.0
    return Picture(shape, scale, rms, _signed_codes(a / scale), _signed_codes(b / scale), _codes(apart / rms))


def _starts(n, most):
    """Return the first index of each of at most `most` blocks of nearly the same size."""
    blocks = min(n, most)
    return [i * n // blocks for i in range(blocks)]


def _apart(a, b):
    """Return |b - a|: 0 where both are the same infinity or NaN, and infinite where only one is."""
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(b - a)
    return np.where(same, 0, np.where(np.isnan(apart), np.inf, apart))


def _extreme(strip, columns):
    """Return the element of the largest magnitude in each block: [n, C] -> [columns]."""
    high = np.maximum.reduceat(strip.max(axis=0), columns)  # a NaN in a block makes both NaN
    low = np.minimum.reduceat(strip.min(axis=0), columns)
    return np.where(high >= -low, high, low)


def _signed_codes(x):
    finite = np.isfinite(x)
    codes = np.rint(127 * np.clip(np.where(finite, x, 0), -1, 1))
    return np.where(finite, codes, NOT_FINITE).astype(np.int8)


def _codes(x):
    positive = np.isfinite(x) & (x > 0)
    codes = np.rint(1 + STEPS * (np.log10(np.where(positive, x, 1)) - LOWEST))
    codes = np.where(positive, np.clip(codes, 1, DIFFERENT - 1), 0)
    return np.where(np.isfinite(x), codes, DIFFERENT).astype(np.uint8)


class Pictures:
    """The pictures of a comparison: of the first differing steps and their neighbors, and of others.

    `limit` is the number of bytes that the others may have together. If they have more, the ones with the
    largest errors are kept.
    """

    def __init__(self, limit=LIMIT):
        self.limit, self._made = limit, []

    def add(self, step, a, b):
        """Make the picture of a StepDifference from its arrays in A's layout."""
        self._made.append((step, picture(a, b)))

    def by_name(self):
        """Return the pictures to show, by the step's name in A."""
        departing = [i for i, (step, _) in enumerate(self._made) if step.departs][:FIRST]
        near = {i for n in departing for i in range(n - NEAR, n + NEAR + 1)}
        kept, left = set(), self.limit
        for i in sorted(range(len(self._made)), key=lambda i: (i not in near, -self._made[i][0].relative)):
            _, made = self._made[i]
            if made is None:
                continue
            left -= 3 * made.a.size * (i not in near)
            if left >= 0:
                kept.add(i)
        return {self._made[i][0].name: self._made[i][1] for i in sorted(kept)}
