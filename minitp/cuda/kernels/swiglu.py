"""Launches swiglu.cu, the twin of `ops.swiglu`."""

import numpy as np

THREADS = 256


class Swiglu:
    """silu(gate) * up, of many rows.

    Parameters
    ----------
    compiler : Compiler
    """

    def __init__(self, compiler):
        self._kernel = compiler.kernel("swiglu.cu", "swiglu")

    def __call__(self, gate_up, out):
        """16-bit: `gate_up` [T, 2 F_r], gate first; `out` [T, n], n at least F_r: the rest becomes 0."""
        rows, stride = out.shape
        args = (gate_up, out, np.int32(gate_up.shape[1] // 2), np.int32(stride))
        self._kernel((rows, -(-stride // THREADS)), (THREADS,), args)
