"""Launch heads.cu: norms of q and k heads, RoPE of a part of a head, and heads with padding."""

import numpy as np

THREADS = 256
WARPS = 8  # heads per block


class Heads:
    """A kernel that turns the joined projection into queries, and into keys and values in a paged cache.

    Parameters
    ----------
    compiler : Compiler
    head_dim, rotary_dim : int
        The size of a head, and the number of its dimensions that RoPE rotates.
    eps : float
        The eps of the norms.
    defines
        Macros: PLUS_ONE for `ops.rms_norm_plus_one`.
    """

    def __init__(self, compiler, head_dim, rotary_dim, eps, **defines):
        self._kernel = compiler.kernel("heads.cu", "heads", **defines)
        self._sizes, self._eps = (head_dim, rotary_dim), np.float32(eps)

    def __call__(self, qkv, norms, cos, sin, slots, q, k_cache, v_cache):
        """Write the queries into `q`, and the keys and values into the caches.

        16-bit arrays: `qkv` [n, (H + 2K) d], `norms` two weights [d] or two None, `q` [n, H, d and padding],
        `k_cache` and `v_cache` [K, capacity, d and padding]; padding is not written. `cos` and `sin` are
        float32 [n, R/2]; no sine is negated. `slots`, int32 [n], is each token's cache slot; -1 for none.
        """
        tokens, q_heads, stride = q.shape
        kv_heads, capacity, _ = k_cache.shape
        grid = (tokens, -(-(q_heads + 2 * kv_heads) // WARPS))
        numbers = map(np.int32, (q_heads, kv_heads, *self._sizes, stride, capacity))
        arrays = (qkv, *norms, self._eps, cos, sin, slots, q, k_cache, v_cache)
        self._kernel(grid, (THREADS,), (*arrays, *numbers))
