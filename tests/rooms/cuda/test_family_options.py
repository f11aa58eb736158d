"""Tests of what families other than Llama need of the kernels, run on the CPU, against the operations."""

import ml_dtypes
import numpy as np
import pytest
from cuda_on_cpu import CpuCompiler

from minitp import ops
from minitp.cuda.kernels.attention_decode import AttentionDecode
from minitp.cuda.kernels.attention_prefill import AttentionPrefill
from minitp.cuda.kernels.heads import Heads
from minitp.cuda.kernels.linear import Linear
from minitp.cuda.kernels.rms_norm import RmsNorm
from minitp.cuda.loader import padded

F16, BF16 = np.float16, ml_dtypes.bfloat16
EPS = 1e-5


def assert_nearly_equal(found, expected):
    """Check equality up to a last bit, which another order of a sum may change."""
    eps = float(ml_dtypes.finfo(found.dtype).eps)
    assert (found == expected).mean() > 0.97
    np.testing.assert_allclose(found.astype(float), expected.astype(float), rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "rotary_dim", "norm", "defines"),
    [
        (BF16, 128, 128, ops.rms_norm, {}),
        (F16, 36, 36, ops.rms_norm_plus_one, {"PLUS_ONE": 1}),
        (BF16, 70, 34, None, {}),
    ],
)
def test_heads(dtype, head_dim, rotary_dim, norm, defines):
    draw, tokens, heads, kv_heads, capacity = np.random.default_rng(head_dim), 3, 5, 2, 9
    qkv = draw.normal(size=(tokens, (heads + 2 * kv_heads) * head_dim)).astype(dtype)  # [n, (H + 2K) d]
    weights = (1 + draw.normal(size=(2, head_dim)) / 4).astype(dtype)  # [2, d]
    cos, sin = ops.rope_cos_sin(
        np, np.arange(tokens), np.linspace(1, 0.01, rotary_dim // 2, dtype=np.float32)
    )
    half_cos, half_sin = (np.ascontiguousarray(table[:, rotary_dim // 2 :]) for table in (cos, sin))
    slots = np.array([4, -1, 7], np.int32)  # [n]
    q = np.zeros((tokens, heads, padded(head_dim)), dtype)  # [n, H, d and padding]
    caches = np.full((2, kv_heads, capacity, padded(head_dim)), 7, dtype)
    kernel = Heads(CpuCompiler(dtype), head_dim, rotary_dim, EPS, **defines)
    norms = weights if norm else (None, None)
    kernel(qkv, norms, half_cos, half_sin, slots, q, *caches)

    qk, v = ops.split_heads(np, qkv, heads, kv_heads)  # [H + K, n, d], [K, n, d]
    if norm:
        parts = zip((qk[:heads], qk[heads:]), weights, strict=True)
        qk = np.concatenate([norm(np, part, weight, EPS) for part, weight in parts])  # [H + K, n, d]
    qk = ops.apply_rope(np, qk, cos, sin)  # [H + K, n, d]
    assert_nearly_equal(q[..., :head_dim].transpose(1, 0, 2), qk[:heads])
    assert_nearly_equal(caches[0][:, [4, 7], :head_dim], qk[heads:][:, [0, 2]])
    np.testing.assert_array_equal(caches[1][:, [4, 7], :head_dim], v[:, [0, 2]])
    assert (q[..., head_dim:] == 0).all()  # padding, and slots of no token, are not written
    assert (caches[..., head_dim:] == 7).all()
    assert (np.delete(caches, [4, 7], axis=2) == 7).all()


@pytest.mark.parametrize("post_norm", [False, True])
def test_rms_norm_with_options(post_norm):
    """Check the norm that adds 1, a norm of the addend, a multiplier, and columns of padding."""
    draw, width = np.random.default_rng(5), 42
    x, addend, out = (np.zeros((3, padded(width)), BF16) for _ in range(3))  # [T, D and padding] each
    x[:, :width], addend[:, :width] = draw.normal(size=(2, 3, width))
    vectors = np.zeros((3, padded(width)), BF16)
    vectors[:, :width] = draw.normal(size=(3, width)) / 2
    weight, bias, post = vectors[:, :width]  # [D] each
    added = addend[:, :width] + bias  # [T, D]
    if post_norm:
        added = ops.rms_norm_plus_one(np, added, post, EPS)  # [T, D]
    stream = x[:, :width] + ops.scaled(np, added, 0.22)  # [T, D]
    kernel = RmsNorm(CpuCompiler(BF16), post_norms=True, PLUS_ONE=1)
    kernel(x, weight, out, EPS, addend, bias, post if post_norm else None, 0.22)
    assert_nearly_equal(x[:, :width], stream)
    assert_nearly_equal(out[:, :width], ops.rms_norm_plus_one(np, x[:, :width], weight, EPS))
    assert (x[:, width:] == 0).all()
    assert (out[:, width:] == 0).all()


def test_linear_with_options():
    draw, width, columns, heads = np.random.default_rng(6), 36, 20, 3
    linear = Linear(CpuCompiler(BF16), PLUS_ONE=1, GELU=1, SOFT_CAP=1)
    x, norm_weight = np.zeros((1, padded(width)), BF16), np.zeros(padded(width), BF16)
    x[:, :width], norm_weight[:width] = draw.normal(size=(1, width)), draw.normal(size=width) / 4
    norm = norm_weight[:width], EPS
    weight = np.zeros((2 * columns, padded(width)), BF16)
    weight[:, :width] = draw.normal(size=(2 * columns, width)) / width**0.5
    h, w = ops.rms_norm_plus_one(np, x[:, :width], *norm), weight[:, :width].T
    act = np.zeros((1, columns), BF16)
    linear.swiglu(x, weight, act, norm=norm)
    assert_nearly_equal(act, ops.geglu(np, ops.column_parallel(np, h, w)))
    logits = np.zeros((1, 2 * columns), np.float32)
    linear.logits(x, weight, logits, norm, scaling=3.0, softcap=0.5)
    np.testing.assert_allclose(logits, ops.logits_partial(np, h, w, 0.5, 3.0), atol=2e-3)
    stream = draw.normal(size=(1, 2 * columns)).astype(BF16)
    expected = stream + ops.scaled(np, ops.row_parallel(np, x[:, :width], w), 0.22)
    linear.residual(x, weight, stream, multiplier=0.22)
    assert_nearly_equal(stream, expected)

    head_dim, rotary_dim = 8, 4  # in arrays with room for 16
    rows = np.concatenate([weight[:40], weight[:32]])[: (heads + 2) * head_dim]  # [(H + 2) d, D and padding]
    cos, sin = ops.rope_cos_sin(np, np.array([5]), np.array([1, 0.1], np.float32))  # [1, R] each
    q, k, v = (np.zeros(shape, BF16) for shape in ((1, heads, 16), (1, 4, 16), (1, 4, 16)))
    tables = np.array([2], np.int32), cos[:, 2:].copy(), sin[:, 2:].copy()
    linear.qkv(x, rows, q, k, v, *tables, heads, 1, head_dim, rotary_dim)
    y = ops.column_parallel(np, x[:, :width], rows[:, :width].T)
    qk, values = ops.split_heads(np, y, heads, 1)
    qk = ops.apply_rope(np, qk, cos, sin)
    assert_nearly_equal(q[..., :head_dim].transpose(1, 0, 2), qk[:heads])
    assert_nearly_equal(k[:, 2:3, :head_dim], qk[heads:])
    assert_nearly_equal(v[:, 2:3, :head_dim], values)
    assert not any(array[..., head_dim:].any() for array in (q, k, v))


@pytest.mark.parametrize(("dtype", "head_dim", "softcap"), [(F16, 14, None), (BF16, 14, 1.5)])
def test_attention_with_options(dtype, head_dim, softcap):
    """Check heads with padding, another scale and a soft cap, in a prompt and in the decode pass after it."""
    draw, tokens, groups, width = np.random.default_rng(7), 20, [(0, 2), (2, 5)], padded(head_dim)
    q, k, v = (np.zeros((n, tokens, width), dtype) for n in (5, 2, 2))  # [H, n, d], [K, n, d] each
    for array in (q, k, v):
        array[..., :head_dim] = draw.normal(size=(len(array), tokens, head_dim))
    options = dict(scale=0.4, softcap=softcap)
    mask = ops.causal_mask(np, np.arange(tokens), 0, tokens, 9)  # [n, n]
    real = [array[..., :head_dim] for array in (q, k, v)]
    probs = ops.softmax(np, ops.attention_scores(np, *real[:2], groups, mask, **options))  # [H, n, n]
    expected = ops.attention_context(np, probs, real[2], groups)  # [n, H d]
    table = np.array([0, 1], np.int32)  # [blocks]
    caches = [np.concatenate([x, np.zeros((2, 12, width), dtype)], axis=1) for x in (k, v)]  # [K, 32, d]
    by_token = np.ascontiguousarray(q.transpose(1, 0, 2))  # [n, H, d and padding]
    out = np.zeros((tokens, 5 * head_dim), dtype)  # [n, H d]
    compiler = CpuCompiler(dtype)
    AttentionPrefill(compiler, np, groups, head_dim, 16, 9, **options)(
        by_token.reshape(tokens, -1), *caches, table, np.int32([[0, tokens, 0, 0]]), tokens, out
    )
    last = np.zeros((1, padded(5 * head_dim)), dtype)  # [1, H d and padding]
    decode = AttentionDecode(compiler, np, groups, head_dim, 16, 1, 32, 4, 9, **options)
    decode(by_token[-1:], *caches, table[None], np.array([tokens], np.int32), last)
    atol = 4 * float(ml_dtypes.finfo(dtype).eps)
    np.testing.assert_allclose(out.astype(float), expected.astype(float), atol=atol)
    np.testing.assert_allclose(last[:, : 5 * head_dim].astype(float), expected[-1:].astype(float), atol=atol)
