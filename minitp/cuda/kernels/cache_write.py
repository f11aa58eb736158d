"""Launch cache_write.cu, the GPU counterpart of `ops.apply_rope` and `PagedCache.append`."""

import numpy as np

THREADS = 256


class CacheWrite:
    """A kernel that applies RoPE to queries and keys, and writes keys and values to a paged cache.

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
        """Rotate q in `qkv` in place, and write rotated k, and v, to the caches.

        16-bit: `qkv` [n, (H + 2K) d], `k_cache` and `v_cache` [K, capacity, d]. `cos` and `sin` are float32
        [n, d/2], both without signs. `slots` int32 [n] is the cache slot of each token; -1 for none.
        """
        kv_heads, capacity, _ = k_cache.shape
        heads = qkv.shape[1] // self._head_dim - 2 * kv_heads
        numbers = map(np.int32, (heads, kv_heads, capacity))
        self._kernel((len(qkv),), (THREADS,), (qkv, cos, sin, slots, k_cache, v_cache, *numbers))
