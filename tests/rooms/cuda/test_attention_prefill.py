"""Tests of attention_prefill.cu and cache_write.cu, run on the CPU, against the explicit operations."""

import ml_dtypes
import numpy as np
import pytest
from cuda_on_cpu import CpuCompiler

from minitp import ops
from minitp.cuda.kernels.attention_prefill import AttentionPrefill
from minitp.cuda.kernels.cache_write import CacheWrite

F16, BF16 = np.float16, ml_dtypes.bfloat16
DTYPES = (F16, BF16)
PADDING = 8  # columns of out after the last head


def check(dtype, tokens, past, groups, head_dim, block_size=16, window=None):
    """Check attention with NaN in everything that it may not read: other cache slots, and k and v in qkv."""
    draw = np.random.default_rng(tokens + past + head_dim)
    stops = np.cumsum(groups).tolist()
    query_groups = list(zip([0, *stops[:-1]], stops, strict=True))
    heads, kv_heads = stops[-1], len(groups)
    qkv = np.full((tokens, (heads + 2 * kv_heads) * head_dim), np.nan, dtype)  # [n, (H + 2K) d]
    q = qkv[:, : heads * head_dim]  # [n, H d]
    q[:] = draw.normal(size=q.shape).astype(dtype)
    total = past + tokens
    blocks = -(-total // block_size)
    block_table = draw.permutation(blocks + 1)[:blocks].astype(np.int32)  # [blocks]; one block is not used
    first_key = max(0, past - window + 1) if window else 0
    positions = np.arange(first_key, total)  # [W]
    slots = block_table[positions // block_size] * block_size + positions % block_size  # [W]
    caches = np.full((2, kv_heads, (blocks + 1) * block_size, head_dim), np.nan, dtype)
    k, v = draw.normal(size=(2, kv_heads, len(slots), head_dim)).astype(dtype)  # [K, W, d] each
    caches[0][:, slots], caches[1][:, slots] = k, v
    out = np.full((tokens, heads * head_dim + PADDING), np.nan, dtype)  # [n, H d + PADDING]
    prefill = AttentionPrefill(CpuCompiler(dtype), np, query_groups, head_dim, block_size, window)
    prefill(q, *caches, block_table, np.array([[0, tokens, past, 0]], np.int32), tokens, out)

    by_head = q.reshape(tokens, heads, head_dim).transpose(1, 0, 2)  # [H, n, d]
    mask = ops.causal_mask(np, np.arange(past, total), first_key, total, window)  # [n, W]
    probs = ops.softmax(np, ops.attention_scores(np, by_head, k, query_groups, mask))  # [H, n, W]
    expected = ops.attention_context(np, probs, v, query_groups).astype(np.float32)  # [n, H d]
    magnitude = ops.attention_context(np, probs, np.abs(v.astype(np.float32)), query_groups)  # [n, H d]
    # Both round the values' weights to 16 bits (the kernel before dividing by their sum, the operations after
    # it), and then the result. Each rounding is at most half an eps of the mean of the values' magnitudes.
    error = np.abs(out[:, :-PADDING].astype(np.float32) - expected)
    assert (error <= 2 * float(ml_dtypes.finfo(dtype).eps) * magnitude).all(), (error / magnitude).max()
    assert np.isnan(out[:, -PADDING:]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 64, 100])
@pytest.mark.parametrize(("past", "block_size"), [(0, 16), (70, 5)])
def test_tokens(dtype, tokens, past, block_size):
    check(dtype, tokens, past, (1, 2), 24, block_size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 16, 99, 100, 101])
@pytest.mark.parametrize("past", [0, 70])
def test_window(dtype, window, past):
    check(dtype, 100, past, (3, 1), 24, 16, window)


@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(F16, 8), (BF16, 64), (F16, 80), (F16, 128), (BF16, 128), (BF16, 192), (F16, 256)]
)
@pytest.mark.parametrize("groups", [(1, 4), (9,)])
def test_heads(dtype, head_dim, groups):
    check(dtype, 20, 50, groups, head_dim)


def test_several_sequences_have_the_bits_of_each_alone():
    """Check sequences of several tiles, of one row and without rows, each with its own table."""
    draw, heads, head_dim, kv_heads, block_size = np.random.default_rng(0), 4, 16, 2, 8
    counts, pasts = (50, 1, 0, 20), (0, 13, 0, 9)
    tables = np.split(draw.permutation(40).astype(np.int32), [10, 20, 30])
    caches = draw.normal(size=(2, kv_heads, 40 * block_size, head_dim)).astype(F16)
    q = draw.normal(size=(sum(counts), heads * head_dim)).astype(F16)  # [T, H d]
    prefill = AttentionPrefill(CpuCompiler(F16), np, [(0, 2), (2, 4)], head_dim, block_size, 12)
    rows = np.cumsum((0, *counts[:-1]))
    found, alone = np.full((2, *q.shape), np.nan, F16)
    sequences = np.stack((rows, counts, pasts, (0, 10, 20, 30)), axis=1).astype(np.int32)  # [S, 4]
    prefill(q, *caches, np.concatenate(tables), sequences, 64, found)
    for row, count, past, table in zip(rows, counts, pasts, tables, strict=True):
        if count:
            one = np.array([[0, count, past, 0]], np.int32)
            prefill(q[row : row + count], *caches, table, one, count, alone[row : row + count])
    assert not np.isnan(found).any()
    np.testing.assert_array_equal(found, alone)


def test_rows_whose_window_has_no_key_in_a_tile():
    check(F16, 64, 0, (1,), 256, window=1)  # at this head_dim a tile has 16 keys, and a block 64 tokens


@pytest.mark.parametrize(
    ("dtype", "head_dim", "tokens"),
    [
        *((dtype, d, n) for dtype, d in ((F16, 8), (BF16, 24), (F16, 128), (BF16, 128)) for n in (1, 5)),
        # Enough numbers to notice an fma, which changes one float16 result in 10,000.
        *((dtype, 128, 300) for dtype in (F16, BF16)),
    ],
)
def test_cache_write(dtype, head_dim, tokens):
    heads, kv_heads, capacity = 3, 2, tokens + 7
    draw = np.random.default_rng(head_dim)
    qkv = draw.normal(size=(tokens, (heads + 2 * kv_heads) * head_dim)).astype(dtype)  # [n, (H + 2K) d]
    angles = draw.uniform(0, 100, size=(tokens, head_dim // 2)).astype(np.float32)  # [n, d/2]
    cos, sin = np.cos(angles), np.sin(angles)  # [n, d/2] each
    qk, v = ops.split_heads(np, qkv.copy(), heads, kv_heads)  # [H + K, n, d], [K, n, d]
    both = np.concatenate((cos, cos), axis=-1), np.concatenate((-sin, sin), axis=-1)  # [n, d] each
    rotated = ops.apply_rope(np, qk, *both)  # [H + K, n, d]
    slots = draw.permutation(capacity)[:tokens].astype(np.int32)  # [n]
    slots[tokens // 2] = -1
    expected = np.full((2, kv_heads, capacity, head_dim), np.nan, dtype)
    written = slots >= 0  # [n]
    expected[0][:, slots[written]] = rotated[heads:, written]
    expected[1][:, slots[written]] = v[:, written]
    unchanged = qkv[:, heads * head_dim :].copy()

    caches = np.full_like(expected, np.nan)
    CacheWrite(CpuCompiler(dtype), head_dim)(qkv, cos, sin, slots, *caches)
    np.testing.assert_array_equal(caches.astype(np.float32), expected.astype(np.float32))
    by_head = qkv.reshape(tokens, -1, head_dim).transpose(1, 0, 2)  # [H + 2K, n, d]
    np.testing.assert_array_equal(by_head[:heads], rotated[:heads])
    np.testing.assert_array_equal(qkv[:, heads * head_dim :], unchanged)
