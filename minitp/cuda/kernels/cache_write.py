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
        """Rotate q in place in `qkv`, and write the rotated k and the unchanged v to the caches.

        16-bit arrays: `qkv` [n, (H + 2K) d], `k_cache` and `v_cache` [K, capacity, d]. `cos` and `sin` are
        float32 [n, d/2]; no sine is negated. `slots`, int32 [n], is each token's cache slot; -1 for none.
        """
        kv_heads, capacity, _ = k_cache.shape
        heads = qkv.shape[1] // self._head_dim - 2 * kv_heads
        numbers = map(np.int32, (heads, kv_heads, capacity))
        self._kernel((len(qkv),), (THREADS,), (qkv, cos, sin, slots, k_cache, v_cache, *numbers))
