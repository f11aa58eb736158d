"""The order and rounding with which a device, a CPU or a tensor core, adds up a matrix product.

A CPU rounds each sum to the nearest float32 number. The errors have either sign, so they grow like the square
root of the number of terms. A tensor core adds a block of n products to the running sum c at once:

    d = c + a_1 b_1 + .. + a_n b_n

    1. The products are exact.
    2. All n + 1 addends are aligned to the largest exponent E among them (a product's exponent is the sum of
       its factors' exponents) and truncated below 2^(E - bits).
    3. The truncated addends are added exactly, and the result is truncated to a float32 number (24 bits).

Nothing is rounded to the nearest number: each block moves the sum toward zero, so the error grows like the
number of blocks. The appendix of docs/check.md derives the error of a product on a GPU from this.

Fasi, Higham, Mikaitis and Pranesh found this behavior on a V100, a T4 and an A100 ("Numerical behavior of
NVIDIA tensor cores", 2021). The numbers n and bits of each architecture, and the definition of a product's
exponent, are from Xie et al., "Bit-Accurate Modeling of GPU Matrix Multiply-Accumulate Units", 2025
(arXiv:2511.10909, algorithm 7 and table 4); see also Khattak and Mikaitis, "Accurate Models of NVIDIA Tensor
Cores", 2025 (arXiv:2512.07004).
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

EXPONENT = np.uint64(0x7FF0 << 48)  # the bits of a float64 number that hold its exponent
HEAD_BITS = np.uint64(0xFFFFFFFFE0000000)  # the bits of its sign, exponent and 24-bit significand
ROOM = 1 << 17  # products computed at a time, so that they stay in a core's cache


class Float32Sums:
    """Sums in float32, one term after the other."""

    def matmul(self, a, b):
        """Return a @ b in float32: [.., n, m] @ [.., m, k] -> [.., n, k].

        BLAS is not used: its order of summation depends on the shapes, and its error may be only a fraction
        of this plain sum's error.
        """
        a, b = (np.ascontiguousarray(x, dtype=np.float32) for x in (a, b))
        return np.einsum("...nm,...mk->...nk", a, b)

    def blocks(self, terms):
        """Return 0, because roundings to the nearest number have no common direction."""
        return 0


@dataclass(frozen=True)
class TensorCoreSums:
    """Sums of products of 16-bit numbers in float32, as tensor cores add them up.

    Attributes
    ----------
    block : int
        Number of products that are added at once.
    bits : int
        Number of bits that the addends keep below the largest exponent. A float32 number has 23 there.
    """

    block: int
    bits: int

    def matmul(self, a, b):
        """Return a @ b in float32, all terms in one chain of blocks: [.., n, m] @ [.., m, k] -> [.., n, k].

        The result is a tensor core's, bit for bit, unless it is smaller than float32's normal numbers.
        """
        smallest = [float(ml_dtypes.finfo(x.dtype).smallest_normal) for x in (a, b)]
        a, b = (np.ascontiguousarray(x.astype(np.float64)) for x in (a, b))
        powers = [_powers(x, normal) for x, normal in zip((a, b), smallest, strict=True)]
        found = np.empty((*a.shape[:-1], b.shape[-1]))  # [.., n, k]
        rows = max(1, ROOM // (self.block * max(1, b.shape[-1])))
        for head in np.ndindex(a.shape[:-2]):
            for start in range(0, a.shape[-2], rows):
                at = (*head, slice(start, start + rows))
                found[at] = self._chain(a[at], b[head], powers[0][at], powers[1][head])
        if not (np.isfinite(a).all() and np.isfinite(b).all()):  # NaN and infinities propagate as in any sum
            plain = np.matmul(a, b)  # [.., n, k]
            found = np.where(np.isfinite(plain), found, plain)
        with np.errstate(over="ignore"):
            return found.astype(np.float32)

    def _chain(self, a, b, powers_a, powers_b):
        """Return a @ b: float64 [n, m] and [m, k], with the leading power of two of each number -> [n, k]."""
        a, powers_a = a.T[:, :, None], powers_a.T[:, :, None]  # [m, n, 1]
        b, powers_b = b[:, None, :], powers_b[:, None, :]  # [m, 1, k]
        total = np.zeros((a.shape[1], b.shape[2]))  # [n, k]
        for start in range(0, len(a), self.block):
            block = slice(start, start + self.block)
            largest = (powers_a[block] * powers_b[block]).max(axis=0)  # [n, k]
            np.maximum(largest, _powers(total, 2.0**-126), out=largest)
            np.maximum(largest, 2.0 ** (-108 - self.bits), out=largest)  # for a block that is all zeros
            units = 2.0**self.bits / largest  # [n, k]: 1 / the last bit that is kept
            addends = a[block] * b[block]  # [block, n, k]
            addends *= units
            np.trunc(addends, out=addends)
            total = (np.trunc(total * units) + addends.sum(axis=0)) / units  # [n, k]
            total = (total.view(np.uint64) & HEAD_BITS).view(np.float64)  # [n, k]
        return total

    def blocks(self, terms):
        """Return the number of blocks in a sum; each moves it toward zero."""
        return -(-terms // self.block)


IN_FLOAT32 = Float32Sums()
# The key is the lowest compute capability of the architecture; the newest comes first.
TENSOR_CORES = {
    90: TensorCoreSums(16, 25),  # Hopper, Blackwell
    75: TensorCoreSums(8, 24),  # Turing, Ampere, Ada
    70: TensorCoreSums(4, 23),  # Volta
}


def sums_of(device):
    """Return the sums with which a Device adds up the products of its compute dtype.

    cuBLAS multiplies float32 matrices without tensor cores, unless lower precision is enabled.
    """
    if not device.is_gpu or device.dtype.itemsize != 2:
        return IN_FLOAT32
    capability = int(device.cupy.cuda.Device().compute_capability)
    return next((sums for first, sums in TENSOR_CORES.items() if capability >= first), IN_FLOAT32)


def _powers(x, smallest):
    """Return the leading power of two of each number, at least `smallest`, and 0 for 0; any shape."""
    return np.where(x == 0, 0, np.maximum((x.view(np.uint64) & EXPONENT).view(np.float64), smallest))
