"""Launches read_memory.cu, which reads memory and does nothing else."""

import numpy as np

THREADS = 256
PIECE = THREADS * 2 * 16  # bytes that a block reads


class ReadMemory:
    """Read an array once.

    Parameters
    ----------
    compiler : Compiler
    xp : module
    nbytes : int
        Of the array, a multiple of PIECE.
    """

    def __init__(self, compiler, xp, nbytes):
        self._kernel = compiler.kernel("read_memory.cu", "read_memory")
        self.sums = xp.zeros(nbytes // PIECE, dtype=np.uint32)  # of each piece its words

    def __call__(self, data):
        """`data` is uint32 [n] of so many bytes."""
        self._kernel((len(self.sums),), (THREADS,), (data, self.sums))
