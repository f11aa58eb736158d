"""Launch rms_norm.cu, the GPU counterpart of `ops.rms_norm` and of the residual addition before it."""

import numpy as np

THREADS = 256


class RmsNorm:
    """A kernel for out = rms_norm(x) * weight; with an addend, x += (addend + bias) * multiplier first.

    Parameters
    ----------
    compiler : Compiler
    post_norms : bool
        Whether calls may have a `post_norm`.
    defines
        Macros: PLUS_ONE for `ops.rms_norm_plus_one`.
    """

    def __init__(self, compiler, post_norms=False, **defines):
        self._kernel = compiler.kernel("rms_norm.cu", "rms_norm", **defines)
        self._with_post_norm = None
        if post_norms:
            self._with_post_norm = compiler.kernel("rms_norm.cu", "rms_norm", POST_NORM=1, **defines)

    def __call__(self, x, weight, out, eps, addend=None, bias=None, post_norm=None, multiplier=1.0):
        """Normalize the rows of x into `out`.

        All arrays are 16-bit: `x`, `addend` and `out` [T, D and padding] with rows of a multiple of 8
        elements, whose padding is zero; `weight`, `bias` and `post_norm` [D], with memory for the padding
        too. With `post_norm`, addend + bias goes through the same norm with that weight before it is added.
        """
        rows, width = x.shape
        kernel = self._kernel if post_norm is None else self._with_post_norm
        numbers = np.int32(width), np.int32(len(weight)), np.float32(multiplier), np.float32(eps)
        kernel((rows,), (THREADS,), (x, addend, bias, post_norm, weight, out, *numbers), dependent=True)
