"""Launches all_reduce.cu: the sum over all ranks of a host, and what follows it in a layer."""

import numpy as np

WARP = 32
WIDEST = 8 * 1024  # a row is a block's, and 8 columns a thread's


class AllReduce:
    """Sums over all ranks, the same bits on each; all of them make the same calls in the same order.

    Parameters
    ----------
    compiler : Compiler
    rank : int
    regions : uint64 [ranks], on the device
        Where this rank sees everybody's region of `region_bytes`. They begin at multiples of 16 bytes, and
        are zeros on all ranks before the first call on any.
    calls : uint64 [max_rows], on the device
        Zeros before the first call. This rank's own.
    missing : int32 [1], on the device
        Zero. 1 + r when rank r was waited for in vain: then nothing more is computed, and nothing waits.
    width : int
        D: a multiple of 8, at most WIDEST.
    patience_s : float
        How long to wait for a rank.
    """

    def __init__(self, compiler, rank, regions, calls, missing, width, patience_s=30.0):
        if width % 8 or width > WIDEST:
            raise ValueError(f"a row of {width}: no multiple of 8, or more than {WIDEST}")
        self._sum = compiler.kernel("all_reduce.cu", "all_reduce", RANKS=len(regions))
        self._sum_and_norm = compiler.kernel("all_reduce.cu", "all_reduce_norm", RANKS=len(regions))
        self._meeting = (regions, calls, missing, np.int32(rank), np.int32(len(calls)), np.int32(width))
        self._patience_ns = np.int64(patience_s * 1e9)
        self._most, self._threads = len(calls), -(-width // (8 * WARP)) * WARP

    def __call__(self, partial, out):
        """The sum of everybody's `partial`, 16-bit [T, D], into `out`; T is at most max_rows."""
        self._launch(self._sum, len(partial), (partial, out, *self._meeting, self._patience_ns))

    def add_and_norm(self, partial, residual, weight, out, eps, bias=None):
        """residual += (the sum of everybody's `partial`) + bias; out = rms_norm(residual) * weight.

        All 16-bit: `partial`, `residual` and `out` [T, D], `weight` and `bias` [D].
        """
        args = (partial, residual, bias, weight, out, *self._meeting, self._patience_ns, np.float32(eps))
        self._launch(self._sum_and_norm, len(partial), args)

    def _launch(self, kernel, rows, args):
        if rows > self._most:
            raise ValueError(f"{rows} rows, where there is room for {self._most}")
        kernel((rows,), (self._threads,), args)


def region_bytes(ranks, max_rows, width):
    """Of one rank: two slots of 16-bit [max_rows, D], and a flag for each row and rank."""
    return 2 * max_rows * width * 2 + max_rows * ranks * 8
