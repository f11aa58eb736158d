"""Tests of linear.cu, run on the CPU, against the operations of `ops` that it fuses."""

import ml_dtypes
import numpy as np
import pytest
from cuda_on_cpu import CpuCompiler

from minitp import ops
from minitp.cuda.kernels.linear import MAX_TOKENS, Linear
from minitp.cuda.kernels.rms_norm import RmsNorm

DTYPES = (np.float16, ml_dtypes.bfloat16)
LINEAR = {dtype: Linear(CpuCompiler(dtype)) for dtype in DTYPES}
TOKENS = (1, 2, 3, 8, 9, 16, 17, 32, 64)
EPS = 1e-5


@pytest.fixture(params=DTYPES, ids=["float16", "bfloat16"])
def dtype(request):
    return request.param


class Draw:
    """A generator of random arrays of a dtype; products of an array and a weight are of size 1."""

    def __init__(self, dtype, seed):
        self.dtype, self.random = dtype, np.random.default_rng(seed)

    def __call__(self, *shape):
        return self.random.normal(size=shape).astype(self.dtype)

    def weight(self, outputs, width):
        return (self.random.normal(size=(outputs, width)) / width**0.5).astype(self.dtype)

    def norm(self, width):
        return (1 + self(width) / 8).astype(self.dtype), EPS


def normed(x, norm):
    return x if norm is None else ops.rms_norm(np, x, *norm)


def assert_nearly_equal(out, expected):
    """Check equality up to the order of sums, which may round values near a tie to the other side."""
    eps = float(ml_dtypes.finfo(out.dtype).eps)
    assert (out == expected).mean() > 0.95
    # Two or three such values may be multiplied or added at the end: 2 units of a value up to 4.
    np.testing.assert_allclose(
        out.astype(np.float32), expected.astype(np.float32), rtol=2 * eps, atol=4 * eps
    )


def canary(draw, *shape):
    return np.full(shape, np.nan, draw.dtype)


@pytest.mark.parametrize("tokens", TOKENS)
def test_store(dtype, tokens):
    draw = Draw(dtype, tokens)
    for outputs, width, biased in ((13, 40, True), (40, 296, False), (48, 8, True)):
        x, weight = draw(tokens, width), draw.weight(outputs, width)
        bias = draw(outputs) if biased else None
        out = canary(draw, tokens, outputs + 3)
        LINEAR[dtype].store(x, weight, out, bias)
        assert_nearly_equal(out[:, :outputs], ops.column_parallel(np, x, weight.T, bias))
        assert np.isnan(out[:, outputs:]).all()


@pytest.mark.parametrize("tokens", [1, 17])
def test_every_column_of_a_long_row_is_used_once(dtype, tokens):
    draw = Draw(dtype, 0)
    x, weight = draw(tokens, 4096), draw.weight(64, 4096)
    out = canary(draw, tokens, 64)
    LINEAR[dtype].store(x, weight, out)
    assert_nearly_equal(out, ops.matmul(np, x, weight.T))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("biased", [False, True])
def test_residual(dtype, tokens, biased):
    draw = Draw(dtype, tokens)
    outputs, width = 56, 360
    x, weight, residual = draw(tokens, width), draw.weight(outputs, width), canary(draw, tokens, outputs + 8)
    residual[:, :outputs] = draw(tokens, outputs)
    bias = draw(outputs) if biased else None
    y = ops.row_parallel(np, x, weight.T)
    expected = residual[:, :outputs] + (y + bias if biased else y)
    LINEAR[dtype].residual(x, weight, residual, bias)
    assert_nearly_equal(residual[:, :outputs], expected)
    assert np.isnan(residual[:, outputs:]).all()


@pytest.mark.parametrize(("tokens", "with_norm"), [(1, True), (1, False), (9, False), (33, False)])
def test_logits(dtype, tokens, with_norm):
    draw = Draw(dtype, tokens)
    outputs, width = 37, 264
    x, weight = draw(tokens, width), draw.weight(outputs, width)
    norm = draw.norm(width) if with_norm else None
    gathered = np.full((tokens, 100), np.nan, np.float32)
    LINEAR[dtype].logits(x, weight, gathered[:, 20 : 20 + outputs], norm)
    expected = ops.logits_partial(np, normed(x, norm), weight.T)
    # The sums, of terms of size 1 / 16, are not rounded to 16 bits; a normed x near a tie may differ.
    atol = float(ml_dtypes.finfo(dtype).eps) if with_norm else 1e-5
    np.testing.assert_allclose(gathered[:, 20 : 20 + outputs], expected, atol=atol)
    assert np.isclose(gathered[:, 20 : 20 + outputs], expected, atol=1e-5).mean() > 0.8
    assert np.isnan(np.delete(gathered, range(20, 20 + outputs), axis=1)).all()


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("biased", [False, True])
def test_swiglu(dtype, tokens, biased):
    draw = Draw(dtype, tokens)
    columns, width = 28, 104
    x, weight = draw(tokens, width), draw.weight(2 * columns, width)
    bias = draw(2 * columns) if biased else None
    if biased:
        bias[3], bias[4] = -200, 200  # for gates: exp(200) overflows float32
    norm = draw.norm(width) if tokens == 1 else None
    out = canary(draw, tokens, columns + 4)
    LINEAR[dtype].swiglu(x, weight, out, bias, norm)
    expected = ops.swiglu(np, ops.column_parallel(np, normed(x, norm), weight.T, bias))
    assert_nearly_equal(out[:, :columns], expected)
    small, also_small = out[:, 3].astype(np.float32), expected[:, 3].astype(np.float32)
    np.testing.assert_allclose(small, also_small, rtol=4 * float(ml_dtypes.finfo(dtype).eps))
    assert np.isnan(out[:, columns:]).all()


@pytest.mark.parametrize("head_dim", [8, 24, 64, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads", "tokens"), [(3, 1, 1), (4, 4, 3), (4, 2, 9), (2, 1, 18)])
def test_qkv(dtype, head_dim, heads, kv_heads, tokens):
    draw = Draw(dtype, head_dim + tokens)
    width, slots = 40, 30
    rows = (heads + 2 * kv_heads) * head_dim
    x, weight = draw(tokens, width), draw.weight(rows, width)
    bias = draw(rows) if heads != kv_heads else None
    norm = draw.norm(width) if tokens == 1 else None
    frequencies = np.linspace(1, 0.01, head_dim // 2).astype(np.float32)
    cos, sin = ops.rope_cos_sin(np, draw.random.integers(0, 1000, tokens), frequencies)  # [T, d] each
    slot = draw.random.permutation(slots)[:tokens].astype(np.int32)
    slot[1::3] = -1

    q, caches = canary(draw, tokens, heads, head_dim), canary(draw, 2, kv_heads, slots, head_dim)
    half_cos, half_sin = (np.ascontiguousarray(table[:, head_dim // 2 :]) for table in (cos, sin))
    sizes = heads, kv_heads, head_dim, head_dim
    LINEAR[dtype].qkv(x, weight, q, *caches, slot, half_cos, half_sin, *sizes, bias, norm)

    y = ops.column_parallel(np, normed(x, norm), weight.T, bias)
    qk, v = ops.split_heads(np, y, heads, kv_heads)
    qk = ops.apply_rope(np, qk, cos, sin)
    assert_nearly_equal(q.transpose(1, 0, 2), qk[:heads])
    written = slot[slot >= 0]
    assert_nearly_equal(caches[0][:, written], qk[heads:][:, slot >= 0])
    assert_nearly_equal(caches[1][:, written], v[:, slot >= 0])
    assert np.isnan(np.delete(caches, written, axis=2)).all()


def test_rope_gives_the_same_bits_as_the_operation(dtype):
    """Check enough numbers to notice an fma, which changes one float16 result in 10,000."""
    draw = Draw(dtype, 5)
    tokens, heads, head_dim, width = 64, 6, 128, 40
    x, weight = draw(tokens, width), draw.weight((heads + 2) * head_dim, width)
    cos, sin = ops.rope_cos_sin(np, np.arange(tokens), np.linspace(1, 0.01, head_dim // 2, dtype=np.float32))
    half_cos, half_sin = (np.ascontiguousarray(table[:, head_dim // 2 :]) for table in (cos, sin))
    y, q = canary(draw, tokens, (heads + 2) * head_dim), canary(draw, tokens, heads, head_dim)
    keys, values = canary(draw, 1, tokens, head_dim), canary(draw, 1, tokens, head_dim)
    slot = np.arange(tokens, dtype=np.int32)
    LINEAR[dtype].store(x, weight, y)
    LINEAR[dtype].qkv(x, weight, q, keys, values, slot, half_cos, half_sin, heads, 1, head_dim, head_dim)
    qk, v = ops.split_heads(np, y, heads, 1)
    rotated = ops.apply_rope(np, qk, cos, sin)
    np.testing.assert_array_equal(q.transpose(1, 0, 2), rotated[:heads])
    np.testing.assert_array_equal(keys, rotated[heads:])
    np.testing.assert_array_equal(values, v)


# Products of one rank of Mistral 7B with TP=4, unless stated otherwise: rows, columns, splits of the columns,
# blocks on 132 multiprocessors, and tiles of 16 rows that the busiest reads (0.75: 3 blocks with a quarter).
SHAPES = {
    "qkv": (1536, 4096, 4, 384, 0.75),
    "o": (4096, 1024, 1, 256, 2),
    "gate and up": (7168, 4096, 2, 896, 3.5),
    "down": (4096, 3584, 1, 256, 2),
    "logits": (8000, 4096, 1, 500, 4),
    "qkv, TP=1": (6144, 4096, 1, 384, 3),
    "gate and up, TP=1": (28672, 4096, 1, 1792, 14),
    "qkv, TP=2": (3072, 4096, 2, 384, 1.5),
}


@pytest.mark.parametrize("name", SHAPES)
def test_splits_leave_no_multiprocessor_idle(name):
    rows, width, splits, blocks, busiest = SHAPES[name]
    linear = Linear(CpuCompiler(np.float16, has_clusters=True), 132)
    assert linear.splits(rows // 2, width) == splits
    assert rows // 16 * splits == blocks
    assert -(-blocks // 132) / splits == busiest
    assert Linear(CpuCompiler(np.float16), 132).splits(rows // 2, width) == 1


@pytest.mark.parametrize(
    ("dtype", "outputs", "splits", "with_norm"), [(DTYPES[0], 24, 4, False), (DTYPES[1], 40, 2, True)]
)
def test_split_products(dtype, outputs, splits, with_norm):
    """Check products that clusters of blocks share, for all tokens together and for a few of them."""
    draw, width, processors = Draw(dtype, outputs), 4096, 9
    linear = Linear(CpuCompiler(dtype, has_clusters=True), processors)
    assert linear.splits(-(-outputs // 16) * 8, width) == splits
    x, weight, bias = draw(MAX_TOKENS, width), draw.weight(outputs, width), draw(outputs)
    norm = draw.norm(width) if with_norm else None
    together, one = canary(draw, MAX_TOKENS, outputs + 3), canary(draw, 1, outputs + 3)
    linear.store(normed(x, norm), weight, together, bias)
    assert_nearly_equal(together[:, :-3], ops.column_parallel(np, normed(x, norm), weight.T, bias))
    assert np.isnan(together[:, -3:]).all()
    linear.store(x[:1], weight, one, bias, norm)
    if with_norm:
        assert_nearly_equal(one[:, :-3], together[:1, :-3])
    else:
        np.testing.assert_array_equal(one[:, :-3], together[:1, :-3])


@pytest.mark.parametrize(
    ("tokens", "before", "after"), [(8, 1.5, 1.5), (16, 2, 1.73), (32, 2, 2), (64, 3, 2.46)]
)
def test_bytes_through_the_l2_cache_per_byte_of_weight(tokens, before, after):
    """Check the bytes of all products of Mistral 7B; docs/performance.md states them."""
    linear = Linear(CpuCompiler(np.float16, has_clusters=True), 132)
    products = [(6144, 4096, 32), (4096, 4096, 32), (28672, 4096, 32), (4096, 14336, 32), (32000, 4096, 1)]
    weights = [rows * width * count for rows, width, count in products]
    fixed = 1 + tokens / (16 if tokens <= 16 else 32)
    chosen = [1 + tokens / (16 * linear.pair_tiles(tokens, rows // 2)) for rows, _, _ in products]
    assert fixed == before
    assert np.average(chosen, weights=weights) == pytest.approx(after, abs=0.01)


def test_a_tokens_output_does_not_depend_on_the_rest_of_the_batch(dtype):
    draw = Draw(dtype, 1)
    outputs = 136  # 9 tiles of pairs, enough for the highest PAIR_TILES on one processor
    assert [LINEAR[dtype].pair_tiles(tokens, outputs // 2) for tokens in (1, 10, 20, 64)] == [1, 2, 2, 4]
    x, weight = draw(MAX_TOKENS, 1304), draw.weight(outputs, 1304)
    together = np.full((MAX_TOKENS, outputs), np.nan, np.float32)
    LINEAR[dtype].logits(x, weight, together)
    for tokens in (1, 10, 20):
        few = np.full((tokens, outputs), np.nan, np.float32)
        LINEAR[dtype].logits(x[-tokens:], weight, few)
        np.testing.assert_array_equal(few, together[-tokens:])


@pytest.mark.parametrize(
    ("tokens", "width", "fits"),
    [(1, 44 << 10, True), (1, (44 << 10) + 8, False), (2, 64, False)],
)
def test_a_fused_norm_needs_one_row_that_fits_into_shared_memory(tokens, width, fits):
    assert Linear.norm_fits(tokens, width) == fits
    draw = Draw(np.float16, 2)
    x, weight, norm = draw(tokens, width), draw.weight(8, width), draw.norm(width)
    out = canary(draw, tokens, 8)
    if fits:
        LINEAR[np.float16].store(x, weight, out, norm=norm)
        assert_nearly_equal(out, ops.matmul(np, normed(x, norm), weight.T))
    else:
        with pytest.raises(ValueError, match="a fused norm needs one row"):
            LINEAR[np.float16].store(x, weight, out, norm=norm)


def test_a_fused_norm_gives_the_same_bits_as_a_separate_one(dtype):
    draw = Draw(dtype, 3)
    x, weight, (norm, eps) = draw(1, 4096), draw.weight(24, 4096), draw.norm(4096)
    h, fused, separate = canary(draw, 1, 4096), *(np.full((1, 24), np.nan, np.float32) for _ in range(2))
    RmsNorm(CpuCompiler(dtype))(x, norm, h, eps)
    LINEAR[dtype].logits(h, weight, separate)
    LINEAR[dtype].logits(x, weight, fused, (norm, eps))
    np.testing.assert_array_equal(fused, separate)


def test_too_many_tokens_are_rejected():
    x = np.zeros((MAX_TOKENS + 1, 8), np.float16)
    with pytest.raises(ValueError, match="supports up to 64"):
        LINEAR[np.float16].store(x, x[:16], np.empty((MAX_TOKENS + 1, 16), np.float16))
