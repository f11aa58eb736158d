"""Tests of products and kernels on a real GPU, in real shapes, against the explicit operations.

The tests of each kernel's edge cases can run on a GPU too; see kernels_on_gpu.
"""

import ml_dtypes
import numpy as np
import pytest
from real_gpu import HALVES, NEEDS_GPU, drawn, same_each_time

from minitp import moe, ops
from minitp.device import DTYPES

pytestmark = NEEDS_GPU

EPS = 1e-5
# (outputs, width) of small uneven matrices, and of Mistral 7B's projections, whole or split over 4 ranks.
SMALL = [(24, 40), (104, 296)]
MISTRAL = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (1536, 4096), (4096, 1024), (4096, 3584)]


@pytest.fixture(params=HALVES)
def compiler(gpu, request):
    from minitp.cuda.compiler import Compiler

    return Compiler(gpu.cupy, np.dtype(DTYPES[request.param]))


def assert_nearly_equal(out, expected):
    """Check equality up to the order of sums, by which values near a tie may round to the other side."""
    eps = float(ml_dtypes.finfo(out.dtype).eps)
    out, expected = out.astype(np.float32), expected.astype(np.float32)
    largest = np.abs(expected).max()
    np.testing.assert_allclose(out, expected, rtol=2 * eps, atol=4 * eps * max(1.0, largest / 4))
    assert (out == expected).mean() > 0.9


# --- the explicit operations ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shapes", [SMALL, MISTRAL[:3]], ids=["small", "mistral"])
def test_products_are_summed_in_float32(gpu, name, shapes):
    for rows in (1, 5, 64):
        for outputs, width in shapes:
            x = drawn(gpu, DTYPES[name], rows, width)
            w = drawn(gpu, DTYPES[name], outputs, width, seed=1, scale=width**-0.5)
            found = same_each_time(gpu, lambda x=x, w=w: gpu.xp.matmul(x, w.T, dtype=np.float32))
            expected = gpu.to_host(x).astype(np.float32) @ gpu.to_host(w).astype(np.float32).T
            np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


# --- kernels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", [SMALL, MISTRAL], ids=["small", "mistral"])
@pytest.mark.parametrize("tokens", [1, 3, 8, 17, 64])
def test_linear(gpu, compiler, shapes, tokens):
    from minitp.cuda.kernels.linear import Linear

    linear, cupy, dtype = Linear(compiler), gpu.cupy, compiler.dtype
    for outputs, width in shapes:
        x = drawn(gpu, dtype, tokens, width)
        w = drawn(gpu, dtype, outputs, width, seed=1, scale=width**-0.5)  # [outputs, width]
        residual = drawn(gpu, dtype, tokens, outputs, seed=2)
        norm = drawn(gpu, dtype, width, seed=3) if linear.norm_fits(tokens, width) else None
        normed = x if norm is None else ops.rms_norm(gpu.xp, x, norm, EPS)
        norm = None if norm is None else (norm, EPS)

        def store(x=x, w=w, norm=norm, outputs=outputs):
            out = cupy.empty((tokens, outputs), dtype)
            linear.store(x, w, out, norm=norm)
            return out

        def add(x=x, w=w, residual=residual):
            out = residual.copy()
            linear.residual(x, w, out)
            return out

        def swiglu(x=x, w=w, norm=norm, outputs=outputs):
            out = cupy.empty((tokens, outputs // 2), dtype)
            linear.swiglu(x, w, out, norm=norm)
            return out

        assert_nearly_equal(same_each_time(gpu, store), gpu.to_host(ops.column_parallel(gpu.xp, normed, w.T)))
        sums = residual + ops.row_parallel(gpu.xp, x, w.T)
        assert_nearly_equal(same_each_time(gpu, add), gpu.to_host(sums))
        gate_up = ops.column_parallel(gpu.xp, normed, w.T)
        assert_nearly_equal(same_each_time(gpu, swiglu), gpu.to_host(ops.swiglu(gpu.xp, gate_up)))


# (experts, per token, width, columns) of a small mixture, and of Mixtral 8x7B and Qwen3-30B-A3B on 4 ranks.
MIXTURES = [(5, 2, 40, 24), (8, 2, 4096, 3584), (128, 8, 2048, 192)]


@pytest.mark.parametrize(("experts", "per_token", "width", "columns"), MIXTURES)
@pytest.mark.parametrize("tokens", [1, 9, 64, 300])
def test_experts(gpu, compiler, experts, per_token, width, columns, tokens):
    from minitp.cuda.kernels.expert_linear import ExpertLinear, ExpertMatrices
    from minitp.cuda.kernels.expert_sum import ExpertSum
    from minitp.cuda.kernels.route import Route, new_routing

    cupy, dtype, rows = gpu.cupy, compiler.dtype, tokens * per_token
    route, linear, add_up = Route(compiler, cupy, True), ExpertLinear(compiler), ExpertSum(compiler)
    x, router = drawn(gpu, dtype, tokens, width), drawn(gpu, dtype, tokens, experts, seed=1)
    gate_up = drawn(gpu, dtype, experts, 2 * columns, width, seed=2, scale=width**-0.5)
    down = drawn(gpu, dtype, experts, width, columns, seed=3, scale=columns**-0.5)
    routing = new_routing(cupy, tokens, experts, per_token)

    def act():
        route(router, routing)
        out = cupy.zeros((rows, columns), dtype)
        linear.swiglu(x, ExpertMatrices.of(cupy, list(gate_up)), routing, out)
        return out[routing.position]

    def total():
        y, out = cupy.zeros((rows, width), np.float32), cupy.zeros((tokens, width), dtype)
        linear.down(sorted_acts, ExpertMatrices.of(cupy, list(down)), routing, y)
        add_up(y, routing, out)
        return out

    acts = same_each_time(gpu, act)
    chosen, weights = moe.route(gpu.xp, router, per_token)
    np.testing.assert_array_equal(gpu.to_host(routing.chosen), gpu.to_host(chosen))
    expected = moe.experts_act(gpu.xp, x, chosen, [w.T for w in gate_up])
    assert_nearly_equal(acts, gpu.to_host(expected))
    order = np.argsort(gpu.to_host(routing.position).reshape(-1))  # [T X]
    sorted_acts = gpu.from_host(acts.reshape(rows, columns)[order])  # [T X, F]
    partial = moe.experts_partial(gpu.xp, gpu.from_host(acts), chosen, weights, [w.T for w in down])
    assert_nearly_equal(same_each_time(gpu, total), gpu.to_host(partial))


@pytest.mark.parametrize(("heads", "kv_heads", "length"), [(4, 2, 70), (32, 8, 4095), (8, 2, 513)])
@pytest.mark.parametrize("window", [None, 64])
def test_attention_decode(gpu, compiler, heads, kv_heads, length, window):
    from minitp.cuda.kernels.attention_decode import AttentionDecode

    size, head_dim, dtype = 16, 128, compiler.dtype
    group, blocks = heads // kv_heads, -(-length // size)
    groups = [(n * group, (n + 1) * group) for n in range(kv_heads)]
    q = drawn(gpu, dtype, 1, heads, head_dim)
    k, v = (drawn(gpu, dtype, kv_heads, blocks * size, head_dim, seed=seed) for seed in (1, 2))
    table = np.random.default_rng(3).permutation(blocks).astype(np.int32)  # [blocks]
    processors = gpu.cupy.cuda.Device().attributes["MultiProcessorCount"]
    shape = groups, head_dim, size, 1, length, processors, window
    attention = AttentionDecode(compiler, gpu.cupy, *shape)
    block_table, lengths = gpu.from_host(table[None]), gpu.from_host(np.array([length], np.int32))

    def run():
        out = gpu.cupy.empty((1, heads * head_dim), dtype)
        attention(q, k, v, block_table, lengths, out)
        return out

    positions = np.arange(max(0, length - window) if window else 0, length)
    slots = gpu.from_host(table[positions // size].astype(np.int64) * size + positions % size)  # [W]
    seen_k, seen_v = k.take(slots, axis=1), v.take(slots, axis=1)  # [K, W, d] each
    scores = ops.attention_scores(gpu.xp, q.transpose(1, 0, 2), seen_k, groups)  # [H, 1, W]
    expected = ops.attention_context(gpu.xp, ops.softmax(gpu.xp, scores), seen_v, groups)
    found, expected = same_each_time(gpu, run).astype(np.float32), gpu.to_host(expected).astype(np.float32)
    eps = float(ml_dtypes.finfo(dtype).eps)
    np.testing.assert_allclose(found, expected, rtol=4 * eps, atol=eps)


@pytest.mark.parametrize("width", [40, 4096])
def test_all_reduce_with_one_rank(gpu, compiler, width):
    from minitp.cuda.kernels.all_reduce import AllReduce, region_bytes
    from minitp.cuda.kernels.rms_norm import RmsNorm

    cupy, rows, dtype = gpu.cupy, 4, compiler.dtype
    region = cupy.zeros(region_bytes(1, rows, width), np.uint8)
    regions, calls, missing = (
        cupy.zeros(n, kind) for n, kind in ((1, np.uint64), (rows, np.uint64), (1, np.int32))
    )
    regions[...] = gpu.from_host(np.array([region.data.ptr], np.uint64))
    reduce = AllReduce(compiler, 0, regions, calls, missing, width)
    partial, x = drawn(gpu, dtype, rows, width), drawn(gpu, dtype, rows, width, seed=1)
    weight = drawn(gpu, dtype, width, seed=2)

    def run(fused):
        residual, out, total = x.copy(), cupy.empty_like(x), cupy.empty_like(x)
        if fused:
            reduce.add_and_norm(partial, residual, weight, out, EPS)
        else:
            reduce(partial, total)
            RmsNorm(compiler)(residual, weight, out, EPS, total)
        return cupy.stack([residual, out])

    found, expected = (same_each_time(gpu, lambda fused=fused: run(fused)) for fused in (True, False))
    np.testing.assert_array_equal(found[0], expected[0])
    assert_nearly_equal(found[1], expected[1])
    assert int(missing[0]) == 0
