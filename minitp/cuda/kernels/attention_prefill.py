"""Launches attention_prefill.cu, the twin of `ops.attention_scores`, `softmax` and `attention_context`."""

from math import ceil

import numpy as np

THREADS = 128
ROWS = 64  # of a block: a row is a token's query of one head


class AttentionPrefill:
    """Causal attention of the next tokens of one sequence over a paged cache that has them already.

    Parameters
    ----------
    compiler : Compiler
    xp : module
    query_groups : list of (start, stop)
        For each KV head the query heads that read it, in order; ragged, of any size.
    head_dim : int
        A multiple of 8, up to 256.
    block_size : int
        Positions of a block of the cache.
    window : int or None
        How many keys a query sees at most, itself included.
    """

    def __init__(self, compiler, xp, query_groups, head_dim, block_size, window=None):
        defines = {"HEAD_DIM": head_dim, "BLOCK_SIZE": block_size}
        self._kernel = compiler.kernel("attention_prefill.cu", "attention_prefill", **defines)
        starts = [start for start, _ in query_groups] + [query_groups[-1][1]]
        self._group_starts = xp.asarray(starts, dtype=np.int32)  # [K + 1]
        self._largest = max(stop - start for start, stop in query_groups)
        self._window = window or 0

    def __call__(self, q, k_cache, v_cache, block_table, past, out):
        """All 16-bit: `q` [n, H * d], `k_cache` and `v_cache` [K, slots, d] of one layer, `out` [n, H * d].

        The tokens have positions past .. past + n - 1, and `block_table`, int32 [blocks], holds these. Rows
        of `q` and `out` may be longer, or lie further apart, by a multiple of 8 elements.
        """
        tokens, kv_heads = len(q), len(k_cache)
        strides = [x.strides[0] // x.itemsize for x in (q, out)]
        numbers = (strides[0], k_cache.shape[1], strides[1], past, tokens, self._window)
        pointers = (q, k_cache, v_cache, block_table, self._group_starts, out)
        grid = (ceil(tokens * self._largest / ROWS), kv_heads)
        self._kernel(grid, (THREADS,), (*pointers, *map(np.int32, numbers)))
