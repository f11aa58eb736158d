"""Launches read_memory.cu, which reads memory and does nothing else."""

import numpy as np

THREADS, LOADS = 256, 2  # of a block, and of a thread: as in read_memory.cu
PIECE = THREADS * LOADS * 16  # bytes that a block reads


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
        self.sums = xp.zeros(nbytes // PIECE, dtype=np.uint32)  # see read_memory.cu

    def __call__(self, data):
        """Launch the kernel over `data`, uint32 [n] of `nbytes` bytes."""
        self._kernel((len(self.sums),), (THREADS,), (data, self.sums))
