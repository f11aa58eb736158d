"""How far one array is from another."""

from dataclasses import dataclass

import numpy as np

WORST = 3  # elements that are named


@dataclass(frozen=True)
class Difference:
    """What `measure` finds.

    Attributes
    ----------
    relative : float
        ||value - expected|| / ||expected||, over the elements that are finite in both. inf if just one is
        NaN, or infinite where the other is not; and if `expected` is zero and `value` is not.
    absolute : float
        The largest |value - expected|; inf as above.
    worst : list of (index, value, expected)
        The elements that are farthest off, the farthest first.
    """

    relative: float
    absolute: float
    worst: list

    @property
    def index(self):
        """Where `absolute` is: a tuple of int."""
        return self.worst[0][0]

    def __str__(self):
        if not self.worst:
            return "empty"
        index, value, expected = self.worst[0]
        place = ", ".join(map(str, index))
        return f"relative error {self.relative:.2g}; at [{place}] it is {value:.6g}, expected {expected:.6g}"


def measure(value, expected):
    """The Difference of two arrays of one shape; infinities and NaN must be in the same places."""
    value, expected = (np.asarray(x).astype(np.float64) for x in (value, expected))
    if value.size == 0:
        return Difference(0.0, 0.0, [])
    finite = np.isfinite(value) & np.isfinite(expected)
    same = (value == expected) | (np.isnan(value) & np.isnan(expected))
    apart = np.abs(np.where(finite, value, 0) - np.where(finite, expected, 0))
    apart = np.where(finite | same, apart, np.inf)
    flat = apart.reshape(-1)
    places = np.flatnonzero(np.isinf(flat))[:WORST]
    if not len(places):
        places = np.argpartition(-flat, min(WORST, flat.size) - 1)[:WORST]
        places = sorted(places, key=lambda place: (-flat[place], place))
    worst = []
    for place in places:
        index = tuple(int(i) for i in np.unravel_index(place, apart.shape))
        worst.append((index, float(value[index]), float(expected[index])))
    with np.errstate(over="ignore"):
        size, off = np.linalg.norm(expected[finite]), np.linalg.norm(apart)
    relative = off / size if size else (np.inf if off else 0.0)
    return Difference(float(relative), float(apart.max()), worst)
