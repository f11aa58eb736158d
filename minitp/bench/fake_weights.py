"""Weights for measuring speed: a block of random numbers again and again, which costs next to nothing.

Speed depends on the shapes, and a little on the values: zeros and constants flip fewer bits, and a GPU that
uses less power for them runs faster; subnormal numbers and NaN slow a CPU down. So these are of the size and
as random as real ones, only that a matrix repeats itself every few million elements.
"""

from functools import cache
from hashlib import sha256

import numpy as np

from minitp.loading.weights import BLOCK_BYTES

LARGEST_READ = BLOCK_BYTES // 4  # elements that a Loader reads at a time
OFFSETS = 1 << 20  # where a tensor may begin in the block


class TiledWeights:
    """Stands where a Checkpoint stands: `read` gives a view of the block.

    Matrices have variance 1 / in, as those of `random_weights`; norm weights are one, biases zero.

    Parameters
    ----------
    shapes : dict of str to tuple
        Checkpoint tensor names and whole shapes.
    dtype : numpy.dtype
        That of the weights, so that nothing is rounded while loading.
    """

    def __init__(self, shapes, dtype):
        self.shapes, self.dtype = shapes, dtype
        self._block = cache(self._draw)  # of this object, by the columns of a matrix

    def read(self, name, index):
        """The slice `index` (a tuple of slices) of tensor `name`."""
        sizes = [part.stop - part.start for part in index]
        if len(sizes) == 1:
            return np.full(sizes, 1 if name.endswith("norm.weight") else 0, self.dtype)
        rows, columns = sizes
        block = self._block(self.shapes[name][1])
        start = int.from_bytes(sha256(f"{name} {index[0].start}".encode()).digest()[:4], "little") % OFFSETS
        if rows * columns > LARGEST_READ:
            return np.resize(block, (rows, columns))
        return block[start : start + rows * columns].reshape(rows, columns)

    def _draw(self, columns):
        uniform = np.random.default_rng(columns).random(LARGEST_READ + OFFSETS, np.float32)  # [n]
        uniform -= np.float32(0.5)
        uniform *= np.float32((12 / columns) ** 0.5)
        return uniform.astype(self.dtype)
