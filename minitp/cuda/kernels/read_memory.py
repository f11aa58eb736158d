"""Launch read_memory.cu, which only reads memory."""

import numpy as np

THREADS, LOADS = 256, 2  # threads per block and loads per thread, as in read_memory.cu
PIECE = THREADS * LOADS * 16  # bytes per block


class ReadMemory:
    """A kernel that reads an array once, to measure the memory's bandwidth.

    Parameters
    ----------
    compiler : Compiler
    xp : module
    nbytes : int
        Size of the array, a multiple of PIECE.
    """

    def __init__(self, compiler, xp, nbytes):
        self._kernel = compiler.kernel("read_memory.cu", "read_memory")
        self.sums = xp.zeros(nbytes // PIECE, dtype=np.uint32)  # see read_memory.cu

    def __call__(self, data):
        """Launch the kernel over `data`, uint32 [n] of `nbytes` bytes."""
        self._kernel((len(self.sums),), (THREADS,), (data, self.sums))
