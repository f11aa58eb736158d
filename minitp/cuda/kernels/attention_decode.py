"""Launch attention_decode.cu: the attention of a decode pass, over a paged cache."""

from functools import cache
from math import ceil

import numpy as np

from minitp.cuda.loader import padded

THREADS = 128
HEADS = 8  # query heads per block
KEYS = 64  # keys that a block's warps read at once; a smaller split would waste some of them
BLOCKS = 2  # blocks per SM: together 64 KiB of loads in flight, three times what saturates the memory
CLUSTER = 8  # most splits per cluster; every GPU with clusters can run this many blocks together


class AttentionDecode:
    """A kernel for attention of one query token per sequence over a paged cache.

    All memory is allocated in the constructor, and the grid depends only on the batch size, so a launch can
    be captured.

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
    max_batch, max_context : int
    processors : int
        Number of streaming multiprocessors of the GPU.
    window : int or None
        Maximum number of keys that a query attends to, including its own; None for no limit.
    scale, softcap : float or None
        As in `ops.attention_scores`.
    """

    def __init__(
        self,
        compiler,
        xp,
        query_groups,
        head_dim,
        block_size,
        max_batch,
        max_context,
        processors,
        window=None,
        scale=None,
        softcap=None,
    ):
        defines = attention_defines(head_dim, block_size, softcap)
        self._kernel = compiler.kernel("attention_decode.cu", "attention_decode", **defines)
        starts = [start for start, _ in query_groups] + [query_groups[-1][1]]
        self._group_starts = xp.asarray(starts, dtype=np.int32)  # [K + 1]
        self._pieces = ceil(max(stop - start for start, stop in query_groups) / HEADS)
        self._rows = len(query_groups) * self._pieces  # rows of the grid
        self._window, self._options = np.int32(window or 0), attention_options(head_dim, scale, softcap)
        self._most_splits = ceil(min(max_context, window or max_context) / KEYS)
        self._slots, self._has_clusters = BLOCKS * processors, compiler.has_clusters
        self.splits = cache(self._splits)
        parts = max(batch * self._rows * self.splits(batch) for batch in range(1, max_batch + 1))
        self._partials = xp.empty((parts, HEADS * (2 + padded(head_dim))), dtype=np.float32)  # see Part
        self._part_bytes = self._partials[0].nbytes
        self._counters = xp.zeros(max_batch * self._rows, dtype=np.uint32)

    def _splits(self, batch):
        """Return the number of blocks that share a sequence's keys, so that the batch fills the GPU.

        The time is the number of waves of blocks, each as long as one split. This is the smallest number
        whose time is within 5% of the least. A cluster has 2, 4 or 8 splits.
        """
        numbers = range(1, min(self._most_splits, self._slots) + 1)
        if self._has_clusters:
            numbers = [n for n in numbers if n % CLUSTER == 0 or n in (1, 2, 4)]
        times = {n: ceil(batch * self._rows * n / self._slots) / n for n in numbers}
        return next(n for n in numbers if times[n] <= 1.05 * min(times.values()))

    def cluster(self, batch):
        """Return the number of splits per cluster."""
        return min(CLUSTER, self.splits(batch)) if self._has_clusters else 1

    def __call__(self, q, k_cache, v_cache, block_table, lengths, out):
        """Write the context of `q` into the first H * d columns of `out`.

        16-bit arrays: `q` [B, H, d and padding], `k_cache` and `v_cache` [K, slots, d and padding] of one
        layer, `out` [B, n], whose rows are a multiple of 4 elements apart. `block_table` is int32 [B,
        max_blocks]. `lengths`, int32 [B], is the number of keys, including the new one; for a length of 0,
        the row of `out` becomes zeros.
        """
        batch, slots = len(q), k_cache.shape[1]
        stride = out.strides[0] // out.itemsize
        numbers = (self._pieces, slots, block_table.shape[1], stride, self._window)
        pointers = (q, k_cache, v_cache, block_table, lengths, self._group_starts, out)
        scratch = (self._partials, self._counters)
        grid = (self.splits(batch), self._rows, batch)
        args = (*pointers, *scratch, *map(np.int32, numbers), *self._options)
        cluster = self.cluster(batch)
        shared = self._part_bytes if cluster > 1 else 0
        self._kernel(grid, (THREADS,), args, shared_mem=shared, dependent=True, cluster=cluster)


def attention_defines(head_dim, block_size, softcap):
    """Return the macros of both attention kernels."""
    capped = {} if softcap is None else {"SOFT_CAP": 1}
    return {"HEAD_DIM": padded(head_dim), "BLOCK_SIZE": block_size, **capped}


def attention_options(head_dim, scale, softcap):
    """Return the last arguments of both attention kernels: d, the scale of the scores and their soft cap."""
    if scale is None:
        scale = np.float32(1) / np.sqrt(np.float32(head_dim))
    return np.int32(head_dim), np.float32(scale), np.float32(softcap or 0)
