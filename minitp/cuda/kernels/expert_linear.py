"""Launch expert_linear.cu: the products of linear.cu with the weights of each token's own experts."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from minitp.cuda.kernels.linear import NORM_BYTES, THREADS, TILE, pairs_of, stride_of, tiles_of


@dataclass
class ExpertMatrices:
    """The matrices of all experts, which have the same shape.

    Attributes
    ----------
    first : 16-bit [outputs, width]
        The matrix of expert 0.
    offsets : int64 [E]
        The distance in elements from there to the matrix of each expert.
    """

    first: Any
    offsets: Any

    @classmethod
    def of(cls, cupy, matrices):
        """Return the ExpertMatrices of a list of arrays, which must stay allocated."""
        first = matrices[0].data.ptr
        distances = [(matrix.data.ptr - first) // matrix.itemsize for matrix in matrices]
        return cls(matrices[0], cupy.asarray(np.array(distances, np.int64)))


class ExpertLinear:
    """The products of a mixture of experts, over the rows of a Routing.

    All arrays are 16-bit and contiguous, except outputs, whose rows may be wider. As in `Linear`, widths are
    multiples of 8, and padding columns are zero.

    Parameters
    ----------
    compiler : Compiler
    """

    def __init__(self, compiler):
        self._compiler = compiler
        self._kernel = cache(self._compile)  # one cache per ExpertLinear

    def swiglu(self, x, weights, routing, out, norm=None):
        """Compute out = silu(gate) * up for each row of `routing`; `out` is [T * X, F or more].

        `x` is [T, k], and `weights` the ExpertMatrices [2 F, k], gate rows first. `norm` is that of `Linear`.
        """
        (outputs, width), (norm_weight, eps) = weights.first.shape, norm or (None, 0)
        inputs = (x, weights.first, weights.offsets, norm_weight, np.float32(eps))
        norm_size = 0 if norm is None else len(norm_weight)
        rest = (np.int32(width), np.int32(outputs // 2), out, stride_of(out))
        args = (*inputs, np.int32(norm_size), routing.slots, routing.token_of, *rest)
        shared = 0 if norm is None else 2 * width
        self._launch("expert_swiglu", outputs // 2, routing, args, shared)

    def down(self, x, weights, routing, out):
        """Compute out = x @ weight.T in float32 for each row of x [T * X, k]; `out` is [T * X, n or more].

        `weights` are the ExpertMatrices [n, k].
        """
        outputs, width = len(weights.first), x.shape[1]  # 0 without FFN columns, where weights have no layout
        inputs = (x, weights.first, weights.offsets, routing.slots)
        args = (*inputs, np.int32(width), np.int32(outputs), out, stride_of(out))
        self._launch("expert_down", pairs_of(outputs), routing, args)

    def _launch(self, name, pairs, routing, args, shared=0):
        if pairs == 0:  # this rank has no FFN columns
            return
        token_tiles, pair_tiles = tiles_of(routing.slot_rows)
        kernel = self._kernel(name, token_tiles, pair_tiles, shared > 0)
        grid = (-(-pairs // (pair_tiles * TILE)), len(routing.slots))
        kernel(grid, (THREADS,), args, shared_mem=shared, dependent=True)

    def _compile(self, name, token_tiles, pair_tiles, normed):
        defines = {"TOKEN_TILES": token_tiles, "PAIR_TILES": pair_tiles, **({"NORM": 1} if normed else {})}
        kernel = self._compiler.kernel("expert_linear.cu", name, **defines)
        if normed:
            kernel.allow_shared_memory(NORM_BYTES)
        return kernel
