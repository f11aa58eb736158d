"""Launch sample.cu, the GPU counterpart of `sampling.Sampler.choose`."""

import numpy as np

THREADS = 256  # the same number as in sample.cu


class Sample:
    """A kernel that samples the next token of each row of logits, with the row's own parameters.

    Parameters
    ----------
    compiler : Compiler
    """

    def __init__(self, compiler):
        self._kernel = compiler.kernel("sample.cu", "sample")

    def __call__(self, logits, temperature, top_k, top_p, draw, token):
        """Write the next token of each row into `token`; the host would choose the same for the same draw.

        Parameters
        ----------
        logits : float32 [B, V]
            The array may be a view of a wider one, but rows must begin at multiples of 16 bytes. A row with
            NaN or +inf, or with only -inf, gets the greedy choice, and NaN counts as the largest.
        temperature : float64 [B]
            0 means greedy; below 0, the row's token is left unchanged (padding, or the host chooses).
        top_k : int32 [B]
        top_p : float64 [B]
        draw : float64 [B]
            Uniform random numbers in [0, 1).
        token : int32 [B]
        """
        rows, size = logits.shape
        stride = logits.strides[0] // 4
        if stride % 4:
            raise ValueError(f"rows of logits are {stride} elements apart, which is not a multiple of 4")
        args = (logits, temperature, top_k, top_p, draw, token, np.int32(size), np.int32(stride))
        self._kernel((rows,), (THREADS,), args)
