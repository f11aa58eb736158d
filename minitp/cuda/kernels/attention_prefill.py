"""Launch attention_prefill.cu: the causal attention of prompts' tokens, over a paged cache."""

from math import ceil

import numpy as np

from minitp.cuda.kernels.attention_decode import attention_defines, attention_options

THREADS = 128
ROWS = 64  # rows per block: a row is one token's query of one head


class AttentionPrefill:
    """A kernel for causal attention of sequences' new tokens over a paged cache that already contains them.

    Parameters
    ----------
    compiler : Compiler
    xp : module
    query_groups : list of (start, stop)
        The query heads that read each KV head, in order; groups may have different sizes.
    head_dim : int
        d, up to 256. In `q` and the caches, it is padded with zeros to a multiple of 8.
    block_size : int
        Positions per block of the cache.
    window : int or None
        Maximum number of keys that a query attends to, including its own; None for no limit.
    scale, softcap : float or None
        As in `ops.attention_scores`.
    """

    def __init__(
        self, compiler, xp, query_groups, head_dim, block_size, window=None, scale=None, softcap=None
    ):
        defines = attention_defines(head_dim, block_size, softcap)
        self._kernel = compiler.kernel("attention_prefill.cu", "attention_prefill", **defines)
        starts = [start for start, _ in query_groups] + [query_groups[-1][1]]
        self._group_starts = xp.asarray(starts, dtype=np.int32)  # [K + 1]
        self._largest = max(stop - start for start, stop in query_groups)
        self._window, self._options = window or 0, attention_options(head_dim, scale, softcap)

    def __call__(self, q, k_cache, v_cache, block_tables, sequences, longest, out):
        """Write the context of `q` into `out`, for the new tokens of all sequences.

        Parameters
        ----------
        q : 16-bit [T, H * (d and padding)]
            The queries of all tokens. Rows may be further apart, by a multiple of 8 elements.
        k_cache, v_cache : 16-bit [K, slots, d and padding]
            The cache of one layer.
        block_tables : int32 [blocks]
            The tables of all sequences, one after another. Each covers all positions up to the last.
        sequences : int32 [S, 4]
            The first row in `q`, the number of rows, the number of keys before them and the start in
            `block_tables` of each sequence. Sequences without rows are allowed.
        longest : int
            Maximum number of rows of a sequence.
        out : 16-bit [T, H * d]
            The context, an output. Rows may be further apart: by a multiple of 8 if d has no padding.
        """
        kv_heads = len(k_cache)
        strides = [x.strides[0] // x.itemsize for x in (q, out)]
        numbers = (strides[0], k_cache.shape[1], strides[1], self._window)
        pointers = (q, k_cache, v_cache, block_tables, sequences, self._group_starts, out)
        grid = (ceil(longest * self._largest / ROWS), kv_heads, len(sequences))
        self._kernel(grid, (THREADS,), (*pointers, *map(np.int32, numbers), *self._options))
