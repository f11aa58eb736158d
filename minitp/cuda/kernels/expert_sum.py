"""Launch expert_sum.cu, the GPU counterpart of the sum in `moe.experts_partial`."""

import numpy as np

THREADS = 256


class ExpertSum:
    """A kernel for the weighted sum of the outputs of each token's experts.

    Parameters
    ----------
    compiler : Compiler
    """

    def __init__(self, compiler):
        self._kernel = compiler.kernel("expert_sum.cu", "expert_sum")

    def __call__(self, y, routing, out, adds=False):
        """Write the sum over the experts of each token to `out` [T, D], or add it to `out`.

        `y`, float32 [T * X, D], has the outputs in the order of the rows of `routing`. The sum is in float32
        and rounded once to the 16-bit dtype of `out`; the rows of both arrays may be wider than D.
        """
        tokens, per_token = routing.position.shape
        columns = y.shape[1]
        strides = [np.int32(x.strides[0] // x.itemsize) for x in (y, out)]
        numbers = (out, np.int32(columns), strides[1], np.int32(adds))
        args = (y, routing.position, routing.weights, np.int32(per_token), strides[0], *numbers)
        self._kernel((tokens, -(-columns // THREADS)), (THREADS,), args, dependent=True)
