"""Launch all_reduce.cu: the sum over all ranks of a host, optionally with the norm that follows it."""

import numpy as np

WARP = 32
WIDEST = 8 * 1024  # a block of up to 1024 threads computes a row, 8 columns per thread


class AllReduce:
    """An all-reduce with the same bits on all ranks; every rank makes the same calls in the same order.

    Parameters
    ----------
    compiler : Compiler
    rank : int
    regions : uint64 [ranks], on the device
        Addresses at which this rank sees each rank's region of `region_bytes`, all multiples of 16 bytes. The
        regions of all ranks must contain zeros before the first call on any rank.
    calls : uint64 [max_rows], on the device
        This rank's counters; zeros before the first call.
    missing : int32 [1], on the device
        0 at first, and 1 + r after rank r failed to arrive in time. Then calls neither compute nor wait.
    width : int
        The row length D: a multiple of 8, at most WIDEST.
    patience_s : float
        Time limit for waiting for a rank.
    """

    def __init__(self, compiler, rank, regions, calls, missing, width, patience_s=30.0):
        if width % 8 or width > WIDEST:
            raise ValueError(f"rows of {width}: the length must be a multiple of 8, at most {WIDEST}")
        self._sum = compiler.kernel("all_reduce.cu", "all_reduce", RANKS=len(regions))
        self._sum_and_norm = compiler.kernel("all_reduce.cu", "all_reduce_norm", RANKS=len(regions))
        self._shared = (regions, calls, missing, np.int32(rank), np.int32(len(calls)), np.int32(width))
        self._patience_ns = np.int64(patience_s * 1e9)
        self._max_rows, self._threads = len(calls), -(-width // (8 * WARP)) * WARP

    def __call__(self, partial, out):
        """Write the sum of all ranks' `partial`, 16-bit [T, D], into `out`; T is at most max_rows."""
        self._launch(self._sum, len(partial), (partial, out, *self._shared, self._patience_ns))

    def add_and_norm(self, partial, residual, weight, out, eps, bias=None):
        """Compute residual += all_reduce(partial) + bias and out = rms_norm(residual) * weight.

        All arrays are 16-bit: `partial`, `residual` and `out` [T, D], `weight` and `bias` [D].
        """
        args = (partial, residual, bias, weight, out, *self._shared, self._patience_ns, np.float32(eps))
        self._launch(self._sum_and_norm, len(partial), args)

    def _launch(self, kernel, rows, args):
        if rows > self._max_rows:
            raise ValueError(f"{rows} rows do not fit: there is room for {self._max_rows}")
        kernel((rows,), (self._threads,), args, dependent=True)


def region_bytes(ranks, max_rows, width):
    """Return the size of one rank's region: two 16-bit slots [max_rows, D], and a flag per row and rank."""
    return 2 * max_rows * width * 2 + max_rows * ranks * 8
