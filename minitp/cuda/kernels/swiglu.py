"""Launch swiglu.cu, the GPU counterpart of `ops.swiglu`."""

import numpy as np

THREADS = 256


class Swiglu:
    """A kernel for silu(gate) * up of many rows.

    Parameters
    ----------
    compiler : Compiler
    defines
        Macros: GELU for `ops.geglu`.
    """

    def __init__(self, compiler, **defines):
        self._kernel = compiler.kernel("swiglu.cu", "swiglu", **defines)

    def __call__(self, gate_up, out):
        """Write silu(gate) * up of `gate_up` [T, 2 F_r] to `out` [T, n >= F_r] and pad with 0; 16-bit."""
        rows, stride = out.shape
        if stride == 0:  # this rank has no columns
            return
        args = (gate_up, out, np.int32(gate_up.shape[1] // 2), np.int32(stride))
        self._kernel((rows, -(-stride // THREADS)), (THREADS,), args)
