"""Launches sample.cu, the twin of `sampling.Sampler.choose`."""

import numpy as np

THREADS = 256  # as sample.cu has it


class Sample:
    """The next token of each row of logits, by parameters of its own.

    Parameters
    ----------
    compiler : Compiler
    """

    def __init__(self, compiler):
        self._kernel = compiler.kernel("sample.cu", "sample")

    def __call__(self, logits, temperature, top_k, top_p, draw, token):
        """Fills `token`; host and device choose the same one, for the draw is the host's.

        Parameters
        ----------
        logits : float32 [B, V]
            Rows begin at multiples of 16 bytes: if V is odd, it is a view of something wider. A row with NaN
            or +inf, or of nothing but -inf, gets the greedy choice, and NaN counts as the largest.
        temperature : float64 [B]
            0 is greedy; a row below 0 pads the batch, and its token stays.
        top_k : int32 [B]
        top_p : float64 [B]
        draw : float64 [B]
            Uniform in [0, 1).
        token : int32 [B]
        """
        rows, size = logits.shape
        stride = logits.strides[0] // 4
        if stride % 4:
            raise ValueError(f"rows of logits are {stride} apart: no multiple of 4")
        args = (logits, temperature, top_k, top_p, draw, token, np.int32(size), np.int32(stride))
        self._kernel((rows,), (THREADS,), args)
