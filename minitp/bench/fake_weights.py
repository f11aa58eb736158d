"""Weights for measuring speed: a repeated block of random numbers, which is quickly made.

Speed depends on the shapes, and a little on the values: zeros and constants flip fewer bits, so that a GPU
uses less power and runs faster; subnormal numbers and NaN slow a CPU down. So these weights are random, with
the variance of real ones, but a matrix repeats itself every few million elements.
"""

from functools import cache
from hashlib import sha256

import numpy as np

from minitp.loading.weights import BLOCK_BYTES

LARGEST_READ = BLOCK_BYTES // 4  # elements that a Loader reads at a time
OFFSETS = 1 << 20  # number of positions in the block at which a tensor may begin


class TiledWeights:
    """A substitute for a Checkpoint whose tensors are views of one block of random numbers.

    Matrices have variance 1 / in, like those of `random_weights`; norm weights are one, biases zero.

    Parameters
    ----------
    shapes : dict of str to tuple
        Full shape of each tensor, by its name in the checkpoint.
    dtype : numpy.dtype
        Dtype of the weights, so that nothing is rounded while loading.
    """

    def __init__(self, shapes, dtype):
        self.shapes, self.dtype = shapes, dtype
        self._block = cache(self._draw)  # one block for each number of columns

    def read(self, name, index):
        """Return the slice `index` (a tuple of slices) of tensor `name`."""
        sizes = [part.stop - part.start for part in index]
        if len(sizes) == 1:
            return np.full(sizes, 1 if name.endswith("norm.weight") else 0, self.dtype)
        rows, columns = sizes
        block = self._block(self.shapes[name][1])
        start = int.from_bytes(sha256(f"{name} {index[0].start}".encode()).digest()[:4], "little") % OFFSETS
        if rows * columns > LARGEST_READ:
            return np.resize(block, (rows, columns))
        return block[start : start + rows * columns].reshape(rows, columns)

    def read_into(self, name, index, out):
        """Write the slice `index` of a tensor into `out`, like Checkpoint.read_into."""
        out[...] = self.read(name, index)

    def _draw(self, columns):
        uniform = np.random.default_rng(columns).random(LARGEST_READ + OFFSETS, np.float32)  # [n]
        uniform -= np.float32(0.5)
        uniform *= np.float32((12 / columns) ** 0.5)
        return uniform.astype(self.dtype)
