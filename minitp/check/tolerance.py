"""How far off a step may be: the bound that comes with the value that it should have.

The oracle computes an operation in float64, and a third implementation does the same formula with its result
rounded to the dtype at hand and sums in float32. Its error is the smallest that can be expected in this
dtype, and an engine may be twice as far off (after flash-attention's tests):

    ||x - value||  <=  2 ||third - value||  +  s ||scale|| / sqrt(samples)
    max|x - value| <=  2 max|third - value| +  s max(scale)

The second term is there because an error measured on few numbers may be small by luck. `scale` is, for each
number, the size that its sum would have if the signs of its terms were random: rounding errors are in
proportion to it, even where the terms cancel. `s` is the error of one such sum in these units: a rounding or
two of the result and a random walk of `terms` roundings in float32, 2 u + u32 sqrt(terms), with u the unit
roundoff of the result's dtype (2^-24, 2^-11, 2^-8 for float32, float16, bfloat16). On tensor cores it has one
part more, u32 times the number of blocks of terms, for each block moves the sum toward zero. A norm over
`samples` independent errors is known to 1 / sqrt(samples) of that, so for arrays of some size only the factor
of two remains.

The numbers in an array are not all samples. A few that are far larger than the rest make the norm by
themselves (in a hidden state one may be ten times all others together), so samples = (sum scale^2)^2 /
sum scale^4, which is the number of elements if all are of one size. And rows of the same token are much
alike, and so are their errors: this is divided by how often a token comes on average.

Where a run fuses operations, an input may be Unseen: then the oracle's chain and the third implementation's
each go on from what they had there, so that the bound grows with the roundings on the way; and the second
term comes once more for the Unseen, with its own roundings and samples: its luck is its own.
"""

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np


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
        The relative roundings of this value and of the Unseen values that it came from, added up: two
        roundoffs each, and one for each block of their sums.
    samples : float
        The fewest samples among them.
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
    blocks : int
        That sum's blocks on a tensor core, 0 elsewhere: see `TensorCoreSums.blocks`.
    common : tuple of int
        Axes along which numbers have much of their error in common, and count as one sample.
    roundings, samples : float
        Those of its Unseen inputs together.
    """

    value: np.ndarray
    third: np.ndarray | None = None
    scale: np.ndarray | None = None
    terms: int = 1
    blocks: int = 0
    common: tuple = ()
    roundings: float = 0.0
    samples: float = 1.0

    def bounds(self, dtype, repeats=1):
        """Return the largest relative and absolute error allowed in `dtype`.

        Each token occurs `repeats` times on average.
        """
        if self.third is None:
            return 0.0, 0.0
        third = rounded(self.third, dtype)  # already so, unless an input was wider than `dtype`
        finite = np.isfinite(self.value) & np.isfinite(third)  # an overflow allows nothing
        size = np.linalg.norm(self.value[finite])
        if size == 0:
            return 0.0, 0.0
        off = third[finite] - self.value[finite]
        slack = 2 * _roundoff(dtype) + _roundoff(np.float32) * (self.terms**0.5 + self.blocks)
        squares = np.square(self.scale, where=finite, out=np.zeros_like(self.scale))
        samples = max(1, _participation(squares.sum(axis=self.common)) / repeats)
        luck = slack / samples**0.5 + self.roundings / max(1, self.samples / repeats) ** 0.5
        relative = (2 * np.linalg.norm(off) + luck * squares.sum() ** 0.5) / size
        largest = 2 * np.max(np.abs(off)) + (slack + self.roundings) * np.max(squares) ** 0.5
        return float(relative), float(largest)

    def unseen(self, dtype):
        """Return this as an Unseen input of the next operation, which the run had in `dtype`."""
        samples = _participation(np.square(self.scale).sum(axis=self.common))
        samples = min(samples, self.samples) if self.roundings else samples
        roundings = self.roundings + 2 * _roundoff(dtype) + _roundoff(np.float32) * self.blocks
        return Unseen(self.value, self.third.astype(dtype), roundings, samples)

    def of(self, *inputs):
        """Return a copy that includes the roundings of the Unseen among its inputs."""
        unseen = [x for x in inputs if isinstance(x, Unseen)]
        if not unseen:
            return self
        roundings, samples = sum(x.roundings for x in unseen), min(x.samples for x in unseen)
        return replace(self, roundings=roundings, samples=samples)

    def divided(self, divisor):
        """Return what is expected of the numbers after a division by `divisor` in float32."""
        value, scale = self.value / divisor, self.scale / divisor
        third = self.third.astype(np.float32) / np.float32(divisor)
        return replace(self, value=value, third=third.astype(np.float64), scale=scale)

    def as_heads(self, head_dim):
        """Return a copy whose arrays are [n, T, d] instead of [T, n * d]."""

        def split(x):
            return x.reshape(len(x), -1, head_dim).transpose(1, 0, 2)

        return replace(self, value=split(self.value), third=split(self.third), scale=split(self.scale))


def _participation(squares):
    """Return (sum x)^2 / sum x^2, which says how many numbers make up the sum. [..] -> float"""
    total = squares.sum()
    return float(total**2 / np.square(squares).sum()) if total else 1.0


def _roundoff(dtype):
    return float(ml_dtypes.finfo(dtype).eps) / 2


def rounded(x, dtype):
    """Return x rounded to the dtype, as float64, in which errors are measured. Overflow gives inf."""
    with np.errstate(over="ignore"):
        return x.astype(dtype).astype(np.float64)
