"""Launch linear.cu: products of a few rows with a weight matrix, fused with what follows in a layer."""

from functools import cache
from math import ceil

import numpy as np

THREADS = 256
TILE = 8  # pairs of weight rows, or tokens, per tile
MAX_TOKENS = 64
PAIR_TILES = {1: (1,), 2: (1, 2), 4: (2,), 8: (2, 4)}  # TOKEN_TILES -> values for which registers suffice
SPLIT_COLUMNS = 1024  # fewest columns per split: what a block's warps request at once
NORM_BYTES = 88 << 10  # shared memory for the normed x; with that for sums it fits into 99 KiB, as sm_86 has


class Linear:
    """The products of a decode pass.

    `x` is [T, k] with T at most `MAX_TOKENS` and k a multiple of 8, `weight` is [n, k] with a row for each
    output, and `bias` is [n] or None. All are 16-bit, and all except the outputs are contiguous. If a weight
    matrix has been padded to make k a multiple of 8, the padding columns of `x` must be zero too. So an
    output that becomes the `x` of such a matrix is wider than n, and its last columns are not written.

    With `norm`, a pair (weight [k without padding], eps), x goes through `ops.rms_norm` first; see
    `norm_fits`. The weight's memory must include the padding.

    Parameters
    ----------
    compiler : Compiler
    processors : int
        Number of streaming multiprocessors, for which products with few rows are split.
    defines
        Macros: PLUS_ONE for `ops.rms_norm_plus_one`, GELU for `ops.geglu`, SOFT_CAP for capped logits.
    """

    def __init__(self, compiler, processors=1, **defines):
        self._compiler, self._processors, self._defines = compiler, processors, defines
        self._kernel = cache(self._compile)  # one cache per Linear

    @staticmethod
    def norm_fits(tokens, width):
        """Return whether a product of x [tokens, width] can fuse its norm; if not, RmsNorm must run first.

        Each block computes the norm itself. The first loads of weights hide the time of one token's norm, but
        not that of several: on an H200 a pass over 8 tokens of Mistral 7B took 8.2 ms with fused norms and
        5.1 ms with separate launches.
        """
        return tokens == 1 and 2 * width <= NORM_BYTES

    def store(self, x, weight, out, bias=None, norm=None):
        """Compute out = x @ weight.T + bias, rounded once; `out` is 16-bit [T, n or more]."""
        outputs = weight.shape[0]
        self._launch(
            "store", pairs_of(outputs), x, weight, norm, np.int32(outputs), bias, out, stride_of(out)
        )

    def residual(self, x, weight, residual, bias=None, multiplier=1.0):
        """Compute residual += (x @ weight.T + bias) * multiplier, 16-bit [T, n or more].

        The result is rounded after each operation.
        """
        outputs = weight.shape[0]
        rest = np.int32(outputs), bias, np.float32(multiplier), residual, stride_of(residual)
        self._launch("residual", pairs_of(outputs), x, weight, None, *rest)

    def logits(self, x, weight, out, norm=None, scaling=1.0, softcap=None):
        """Compute out = ops.logits_partial(x, weight.T); `out` [T, n] may be a slice of a wider array.

        `softcap` must be given if, and only if, the kernels have been compiled with SOFT_CAP.
        """
        outputs = weight.shape[0]
        options = np.float32(scaling), np.float32(softcap or 0)
        self._launch(
            "logits", pairs_of(outputs), x, weight, norm, np.int32(outputs), *options, out, stride_of(out)
        )

    def swiglu(self, x, weight, out, bias=None, norm=None):
        """Compute out = silu(gate) * up, 16-bit [T, F or more]; `weight` is [2 F, k], gate rows first."""
        columns = weight.shape[0] // 2
        self._launch("swiglu", columns, x, weight, norm, np.int32(columns), bias, out, stride_of(out))

    def qkv(
        self,
        x,
        weight,
        q,
        k_cache,
        v_cache,
        slot,
        cos,
        sin,
        heads,
        kv_heads,
        head_dim,
        rotary_dim,
        bias=None,
        norm=None,
    ):
        """Compute q, k and v of a layer, apply RoPE to q and k, and write k and v to the cache.

        Parameters
        ----------
        weight, bias : [(H + 2 K) d, k], [(H + 2 K) d] or None
            The rows of all q heads come first, then k, then v.
        q : 16-bit [T, H, d or more]
            The queries, an output; d is even. The columns after d, here and in the caches, are not written.
        k_cache, v_cache : 16-bit [K, slots, d or more]
            The cache of one layer, an output.
        slot : int32 [T]
            The cache slot of each token; -1 for padding, whose k and v are not written.
        cos, sin : float32 [T, R / 2]
            The cosines and sines of each token's angles: the last R / 2 columns of the results of
            `ops.rope_cos_sin`, in which no sine is negated.
        heads, kv_heads, head_dim, rotary_dim : int
            H, K, d and R, the number of dimensions of a head that RoPE rotates.
        """
        pairs = (heads + 2 * kv_heads) * head_dim // 2
        sizes = heads, kv_heads, head_dim, k_cache.shape[1], rotary_dim, q.shape[2]
        sizes = [np.int32(n) for n in sizes]
        self._launch("qkv", pairs, x, weight, norm, bias, q, k_cache, v_cache, slot, cos, sin, *sizes)

    def _launch(self, name, pairs, x, weight, norm, *rest):
        tokens, width = x.shape
        if pairs == 0:  # this rank has no FFN columns, or no rows of the vocabulary
            return
        if tokens > MAX_TOKENS:
            raise ValueError(f"x has {tokens} rows; linear.cu supports up to {MAX_TOKENS}")
        if norm is not None and not self.norm_fits(tokens, width):
            raise ValueError(f"x [{tokens}, {width}]: a fused norm needs one row of up to {NORM_BYTES} bytes")
        token_tiles, pair_tiles = tiles_of(tokens)[0], self.pair_tiles(tokens, pairs)
        splits = self.splits(pairs, width)
        kernel = self._kernel(name, token_tiles, pair_tiles, splits, norm is not None)
        norm_weight, eps = norm or (None, 0)
        norm_size = 0 if norm is None else len(norm_weight)
        sizes = np.float32(eps), np.int32(norm_size), np.int32(tokens), np.int32(width)
        blocks = -(-pairs // (pair_tiles * TILE)) * splits
        normed, sums = 0 if norm is None else 2 * width, THREADS // 32 * 2 * TILE * token_tiles * TILE * 4
        shared = max(normed, sums) if splits > 1 else normed
        args = (x, weight, norm_weight, *sizes, *rest)
        kernel((blocks,), (THREADS,), args, shared_mem=shared, dependent=True, cluster=splits)

    def pair_tiles(self, tokens, pairs):
        """Return the macro PAIR_TILES: the one with which the busiest multiprocessor reads the fewest bytes.

        These are a block's weights, and x once per block: tokens / (16 pair tiles) bytes per byte of weight.
        Every multiprocessor should have two blocks, so that one reads while the other adds up.
        """
        token_tiles, fewest = tiles_of(tokens)

        def busiest(tiles):
            return ceil(pairs / (tiles * TILE * self._processors)) * tiles * (1 + tokens / (2 * TILE * tiles))

        numbers = [
            n
            for n in PAIR_TILES[token_tiles]
            if n == fewest or pairs > n * TILE * self._processors  # some have two blocks
        ]
        return min(numbers, key=busiest)

    def splits(self, pairs, width):
        """Return the number of blocks that share the columns of each tile of pairs, as a cluster.

        It is the smallest number with which the busiest multiprocessor reads at most 10% more than with the
        best. It does not depend on the number of tokens, because it changes the order of sums.
        """
        numbers = [n for n in (1, 2, 4) if n == 1 or width >= n * SPLIT_COLUMNS]
        if not self._compiler.has_clusters:
            return 1
        tiles = ceil(pairs / TILE)
        busiest = {n: ceil(tiles * n / self._processors) / n for n in numbers}
        return next(n for n in numbers if busiest[n] <= 1.1 * min(busiest.values()))

    def _compile(self, name, token_tiles, pair_tiles, splits, normed):
        defines = {"TOKEN_TILES": token_tiles, "PAIR_TILES": pair_tiles} | self._defines
        defines |= ({"SPLITS": splits} if splits > 1 else {}) | ({"NORM": 1} if normed else {})
        kernel = self._compiler.kernel("linear.cu", name, **defines)
        if normed:
            kernel.allow_shared_memory(NORM_BYTES)
        return kernel


def tiles_of(tokens):
    """Return the macro TOKEN_TILES for a number of tokens, and the lowest PAIR_TILES."""
    token_tiles = next(tiles for tiles in PAIR_TILES if tokens <= tiles * TILE)
    return token_tiles, PAIR_TILES[token_tiles][0]


def pairs_of(outputs):
    """Return the number of pairs, row j with row j + TILE, in the whole tiles that cover `outputs` rows."""
    return -(-outputs // (2 * TILE)) * TILE


def stride_of(out):
    """Return the distance between two rows of `out` [T, n], in elements."""
    return np.int32(out.strides[0] // out.itemsize)
