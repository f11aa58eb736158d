"""Launches cache_write.cu, the twin of `ops.apply_rope` and `PagedCache.append`."""

import numpy as np

THREADS = 256


class CacheWrite:
    """Turns queries and keys by their positions' angles, and puts keys and values into a paged cache.

    Parameters
    ----------
    compiler : Compiler
    head_dim : int
        A multiple of 8.
    """

    def __init__(self, compiler, head_dim):
        self._kernel = compiler.kernel("cache_write.cu", "cache_write", HEAD_DIM=head_dim)
        self._head_dim = head_dim

    def __call__(self, qkv, cos, sin, slots, k_cache, v_cache):
        """`qkv` [n, (H + 2K) d], its q turned in place; `k_cache`, `v_cache` [K, capacity, d]: all 16-bit.

        `cos` and `sin` are float32 [n, d/2], both without signs. `slots` int32 [n] says to which row of the
        cache each token's keys and values go; -1: to none.
        """
        kv_heads, capacity, _ = k_cache.shape
        heads = qkv.shape[1] // self._head_dim - 2 * kv_heads
        numbers = map(np.int32, (heads, kv_heads, capacity))
        self._kernel((len(qkv),), (THREADS,), (qkv, cos, sin, slots, k_cache, v_cache, *numbers))
