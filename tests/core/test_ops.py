"""Tests of each operation of `ops` against the oracle's, on random inputs.

The bounds are derived, not tuned: u(dtype) is half the distance from 1 to the next number, the relative error
of one rounding. The oracle gets exactly the inputs of the operation, so only the operation's roundings count.
"""

import math

import ml_dtypes
import numpy as np
import pytest

from minitp import ops
from minitp.loading.config import parse_config
from minitp.oracle import ops as oracle_ops
from minitp.rope import rope_inverse_frequencies

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), np.dtype(np.float16), BFLOAT16]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def u(dtype):
    return float(ml_dtypes.finfo(dtype).eps) / 2


def tiniest(dtype):
    """Return the distance between neighboring numbers near 0, where the rounding error is absolute."""
    return float(ml_dtypes.finfo(dtype).smallest_subnormal)


U32 = u(np.float32)


def draw(rng, shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


@pytest.fixture
def rng():
    return np.random.default_rng(20240607)


@pytest.fixture(autouse=True)
def floating_point_errors():
    """Raise an error in every test of this file for overflow, 0/0 and inf - inf."""
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        yield


def check(actual, expected, bound, dtype):
    """Check that `actual` has this dtype, is within `bound` of `expected`, and has the same infinities."""
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(np.isneginf(actual), np.isneginf(expected))
    finite = np.isfinite(expected)
    excess = np.abs(oracle_ops.float64(actual) - np.where(finite, expected, 0)) - bound
    assert not (excess[finite] > 0).any(), f"beyond the bound by {excess[finite].max():.3g}"


# --- embedding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("starts", [[0], [0, 4, 7], [0, 1, 2, 11], [0, 5, 5, 12]])  # some have no rows
@all_dtypes
def test_embedding_is_the_sum_of_the_ranks_rows(rng, starts, dtype):
    table = draw(rng, (12, 5), dtype)
    token_ids = np.array([0, 3, 4, 11, 4, 6, 7, 10])
    parts = []
    for start, stop in zip(starts, [*starts[1:], 12], strict=True):
        part = ops.embed_partial(np, token_ids, table[start:stop], start)
        is_local = (token_ids >= start) & (token_ids < stop)
        assert not part[~is_local].any()  # only one rank's row is not zero, so the sum is exact
        parts.append(part)
    check(sum(parts), oracle_ops.embed(token_ids, table), 0, dtype)


def test_embedding_of_one_token(rng):
    table = draw(rng, (3, 4))
    check(ops.embed_partial(np, np.array([2]), table, 0), oracle_ops.embed([2], table), 0, np.float32)


# --- normalization --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "hidden"), [(1, 1), (1, 64), (5, 7), (3, 576)])
@all_dtypes
def test_rms_norm(rng, tokens, hidden, dtype):
    x, weight = draw(rng, (tokens, hidden), dtype), draw(rng, hidden, dtype)
    expected = oracle_ops.rms_norm(x, weight, 1e-5)
    # float32: NumPy sums pairwise, which is about 20 roundings deep. Then there is one rounding to the dtype
    # before the weight and one after it; below the smallest normal number their errors are absolute.
    bound = (20 * U32 + 2.1 * u(dtype)) * np.abs(expected) + 4 * tiniest(dtype)
    check(ops.rms_norm(np, x, weight, 1e-5), expected, bound, dtype)


def test_rms_norm_of_values_whose_squares_overflow_float16(rng):
    x = (draw(rng, (2, 32)) * 1000).astype(np.float16)
    weight = np.ones(32, np.float16)
    expected = oracle_ops.rms_norm(x, weight, 1e-5)
    bound = 2.1 * u(np.float16) * np.abs(expected) + 4 * tiniest(np.float16)
    check(ops.rms_norm(np, x, weight, 1e-5), expected, bound, np.float16)


def test_rms_norm_of_zeros_is_zero():
    assert not ops.rms_norm(np, np.zeros((2, 8), np.float32), np.ones(8, np.float32), 1e-6).any()


# --- projections ----------------------------------------------------------------------------------------

PRODUCTS = [(1, 1, 1), (1, 64, 5), (7, 33, 1), (5, 300, 12), (4, 16, 0)]  # T, in, out


def product_bound(x, w):
    """Return the error bound of float32 sums of n products in any order: n + 1 roundings of each term."""
    return (x.shape[-1] + 1) * U32 * (np.abs(oracle_ops.float64(x)) @ np.abs(oracle_ops.float64(w)))


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), PRODUCTS)
@pytest.mark.parametrize("bias", [False, True])
@all_dtypes
def test_column_parallel(rng, tokens, inputs, outputs, bias, dtype):
    x, w = draw(rng, (tokens, inputs), dtype), draw(rng, (inputs, outputs), dtype)
    b = draw(rng, outputs, dtype) if bias else None
    product = oracle_ops.linear(x, w.T)
    expected = oracle_ops.linear(x, w.T, b)
    # One rounding of the sum to the dtype, and a second one for the bias.
    bound = 1.01 * product_bound(x, w) + 1.01 * u(dtype) * (np.abs(product) + np.abs(expected))
    check(ops.column_parallel(np, x, w, b), expected, bound, dtype)


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), PRODUCTS)
@all_dtypes
def test_row_parallel(rng, tokens, inputs, outputs, dtype):
    x, w = draw(rng, (tokens, inputs), dtype), draw(rng, (inputs, outputs), dtype)
    expected = oracle_ops.linear(x, w.T)
    bound = 1.01 * product_bound(x, w) + u(dtype) * np.abs(expected)
    check(ops.row_parallel(np, x, w), expected, bound, dtype)


def test_row_parallel_of_a_rank_without_columns_adds_nothing():
    y = ops.row_parallel(np, np.ones((3, 0), np.float32), np.ones((0, 4), np.float32))
    assert y.shape == (3, 4)
    assert not y.any()


@pytest.mark.parametrize(("tokens", "hidden", "vocabulary"), PRODUCTS)
@all_dtypes
def test_logits_are_not_rounded_to_the_dtype(rng, tokens, hidden, vocabulary, dtype):
    x, w = draw(rng, (tokens, hidden), dtype), draw(rng, (hidden, vocabulary), dtype)
    check(ops.logits_partial(np, x, w), oracle_ops.linear(x, w.T), product_bound(x, w), np.float32)


# --- rotary position embedding --------------------------------------------------------------------------

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
ROPES = {
    "no fields": {},
    "default": {"rope_theta": 500000.0},
    "default, new spelling": {"rope_parameters": {"rope_type": "default", "rope_theta": 250000.0}},
    "linear, oldest spelling": {"rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "linear, new spelling": {"rope_parameters": {"rope_type": "linear", "factor": 3, "rope_theta": 1e4}},
    "llama3": {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "yarn": {"rope_theta": 1e6, "rope_scaling": YARN},
    "yarn with all fields": {
        "rope_parameters": YARN
        | {"rope_theta": 1e4, "beta_fast": 16, "beta_slow": 2, "truncate": False}
        | {"mscale": 0.7, "mscale_all_dim": 1.3}
    },
    "yarn without a ramp": {"rope_scaling": YARN | {"beta_fast": 1, "original_max_position_embeddings": 3}},
    "longrope": {
        "max_position_embeddings": 8192,
        "rope_scaling": {"type": "longrope", "original_max_position_embeddings": 1024},
    },
    "llama3, new spelling": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
}


def rope_config(rope, head_dim):
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    scaling = rope.get("rope_scaling", {})
    if scaling.get("type") == "longrope":
        divisors = {"short_factor": [1 + i / 4 for i in range(head_dim // 2)]}
        rope = rope | {"rope_scaling": scaling | divisors | {"long_factor": [9.0] * (head_dim // 2)}}
    return {"model_type": "llama", "head_dim": head_dim, **dict.fromkeys(sizes, 8), **rope}


def inverse_frequencies(rope, head_dim):
    config = parse_config(rope_config(rope, head_dim), "config.json")
    return rope_inverse_frequencies(config.rope, config.head_dim)


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("head_dim", [2, 6, 64, 128])
def test_rope_inverse_frequencies(rope, head_dim):
    expected = oracle_ops.rope_inverse_frequencies(rope_config(rope, head_dim))
    assert expected.shape == (head_dim // 2,)
    # Both sides use Python floats; the error of the rounded exponent is multiplied by ln(theta), about 13.
    np.testing.assert_allclose(inverse_frequencies(rope, head_dim), expected, rtol=1e-14 * 13, atol=0)


def test_llama3_keeps_blends_and_divides_frequencies():
    plain = np.array(inverse_frequencies(ROPES["default"], 128))
    ratio = plain / inverse_frequencies(ROPES["llama3"], 128)
    assert {1.0, 8.0} < set(ratio)
    assert ((ratio > 1) & (ratio < 8)).sum() > 3


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_rope_cos_sin(rope):
    positions = np.array([0, 1, 2, 4095, 8191])
    frequencies = np.array(inverse_frequencies(rope, 6), np.float32)
    cos, sin = ops.rope_cos_sin(np, positions, frequencies)
    angles = np.outer(positions, oracle_ops.rope_inverse_frequencies(rope_config(rope, 6)))
    # An angle is a float32 frequency times a position: two roundings. The sine itself is exact to 2 ulp.
    bound = 2 * U32 * angles + 4 * U32
    bound = np.hstack((bound, bound))
    check(cos, np.hstack((np.cos(angles), np.cos(angles))), bound, np.float32)
    check(sin, np.hstack((-np.sin(angles), np.sin(angles))), bound, np.float32)


@pytest.mark.parametrize("factor", [0.5, 0.75])
@pytest.mark.parametrize("kind", ["default", "linear, oldest spelling", "longrope"])
@pytest.mark.parametrize("where", ["top level", "in the RoPE fields"])
def test_frequencies_of_a_part_of_each_head(kind, factor, where):
    """Check that they are those of a head with that many dimensions, wherever the factor stands."""
    rotated = int(64 * factor)
    fields = rope_config(ROPES[kind], rotated) | {"model_type": "phi3", "head_dim": 64}
    name = "rope_scaling" if "rope_scaling" in fields else "rope_parameters"
    partial = {"partial_rotary_factor": factor}
    fields |= partial if where == "top level" else {name: fields.get(name, {}) | partial}
    config = parse_config(fields, "config.json")
    assert (config.rotary_dim, config.unread) == (rotated, ())
    found = rope_inverse_frequencies(config.rope, config.rotary_dim)
    np.testing.assert_allclose(found, inverse_frequencies(ROPES[kind], rotated), rtol=1e-15)
    np.testing.assert_allclose(found, oracle_ops.rope_inverse_frequencies(fields), rtol=1e-14 * 13, atol=0)


def test_apply_rope_to_a_part_of_each_head(rng):
    x = draw(rng, (3, 5, 10), np.float32)
    positions, frequencies = np.arange(5), np.array([1.0, 0.1, 0.01])
    cos, sin = ops.rope_cos_sin(np, positions, frequencies.astype(np.float32))  # [T, 6] each
    rotated = ops.apply_rope(np, x, cos, sin)
    np.testing.assert_array_equal(rotated[..., :6], ops.apply_rope(np, x[..., :6].copy(), cos, sin))
    np.testing.assert_array_equal(rotated[..., 6:], x[..., 6:])
    np.testing.assert_allclose(rotated, oracle_ops.rope(x, positions, frequencies), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 4, 64), (3, 5, 6)])
@pytest.mark.parametrize("past", [0, 1000])
@all_dtypes
def test_apply_rope(rng, shape, past, dtype):
    x = draw(rng, shape, dtype)
    positions = np.arange(past, past + shape[1])
    frequencies = oracle_ops.rope_inverse_frequencies(rope_config({}, shape[-1]))
    cos, sin = ops.rope_cos_sin(np, positions, frequencies.astype(np.float32))
    expected = oracle_ops.rope(x, positions, frequencies)
    first, second = np.split(np.abs(oracle_ops.float64(x)), 2, axis=-1)
    angle_error = 2 * U32 * np.outer(positions, frequencies) + 4 * U32  # as in test_rope_cos_sin
    pair_error = (first + second) * (angle_error + 3 * U32)  # two products and a sum
    bound = np.concatenate((pair_error, pair_error), axis=-1) + 1.01 * u(dtype) * np.abs(expected)
    bound += tiniest(dtype)
    check(ops.apply_rope(np, x, cos, sin), expected, bound, dtype)


# --- attention ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "d"), [(1, 1, 1, 2), (4, 3, 2, 6), (5, 2, 2, 8)])
def test_split_heads(rng, tokens, heads, kv_heads, d):
    q, k, v = (draw(rng, (n, tokens, d)) for n in (heads, kv_heads, kv_heads))
    qkv = np.hstack([*q, *k, *v])  # [T, (H + 2 K) d]
    qk, values = ops.split_heads(np, qkv, heads, kv_heads)
    np.testing.assert_array_equal(qk, np.concatenate((q, k)))
    np.testing.assert_array_equal(values, v)
    assert np.shares_memory(qk, qkv)
    assert np.shares_memory(values, qkv)


# past, T, window: prefill, with a window shorter than the prompt or of one token; decoding; later chunks
SPANS = [(0, 1, None), (0, 6, None), (0, 9, 4), (0, 5, 1), (0, 4, 64)]
SPANS += [(9, 1, None), (9, 1, 4), (6, 3, 4), (7, 5, 3)]


def query_and_key_positions(past, tokens, window):
    """Return the positions of the queries, and of the keys that any of them sees."""
    first_key = 0 if window is None else max(0, past - window + 1)
    return np.arange(past, past + tokens), np.arange(first_key, past + tokens)


@pytest.mark.parametrize(("past", "tokens", "window"), SPANS)
def test_causal_mask(past, tokens, window):
    queries, keys = query_and_key_positions(past, tokens, window)
    mask = ops.causal_mask(np, queries, int(keys[0]), past + tokens, window)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, oracle_ops.causal_mask(queries, keys, window))
    for i, row in zip(queries, mask, strict=True):
        assert row.sum() == min(i + 1, window or i + 1)


@pytest.mark.parametrize(("group", "tokens", "keys", "d"), [(1, 1, 1, 2), (3, 1, 9, 6), (2, 5, 7, 64)])
@pytest.mark.parametrize("masked", [False, True])
@all_dtypes
def test_attention_scores(rng, group, tokens, keys, d, masked, dtype):
    q, k = draw(rng, (group, tokens, d), dtype), draw(rng, (keys, d), dtype)
    mask = rng.random((tokens, keys)) < 0.6 if masked else np.ones((tokens, keys), bool)
    expected = oracle_ops.scores(q, k[None], mask)
    bound = 1.01 * product_bound(q, k.T) / math.sqrt(d) + 2 * U32 * np.abs(np.where(mask, expected, 0))
    found = ops.attention_scores(np, q, k[None], [(0, group)], mask if masked else None)
    check(found, expected, bound, np.float32)


SCORES = {
    "one key": np.array([[[3.0]]]),
    "equal": np.full((2, 3, 5), -7.0),
    "usual": np.random.default_rng(1).standard_normal((2, 3, 40)) * 5,
    "huge": np.random.default_rng(2).standard_normal((2, 3, 40)) * 1e4,
    "plus and minus 1e4": np.array([[[1e4, -1e4, 1e4, 0.0]]]),
    "masked": np.array([[[2.0, -np.inf, 1e4, -np.inf], [-1e4, -np.inf, -np.inf, -np.inf]]]),
}


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_softmax(scores):
    scores = scores.astype(np.float32)
    probs = ops.softmax(np, scores)
    # s - max is rounded once, by up to 100 * U32 where exp(s - max) is not 0, and exp turns this into a
    # relative error. The sum has at most 40 terms. 1e-37 covers the subnormal numbers.
    check(probs, oracle_ops.softmax(scores), 150 * U32 * oracle_ops.softmax(scores) + 1e-37, np.float32)
    np.testing.assert_allclose(probs.sum(axis=-1), 1, rtol=50 * U32)
    assert not probs[np.isneginf(scores)].any()


@pytest.mark.parametrize(("group", "tokens", "keys", "d"), [(1, 1, 1, 2), (3, 1, 9, 6), (2, 5, 70, 64)])
@all_dtypes
def test_attention_context(rng, group, tokens, keys, d, dtype):
    probs = oracle_ops.softmax(draw(rng, (group, tokens, keys))).astype(np.float32)
    v = draw(rng, (keys, d), dtype)
    expected = oracle_ops.context(probs, v[None])  # [T, G * d]
    # The probabilities are rounded to the dtype, and so is the sum.
    bound = np.hstack(product_bound(probs, v)) * (1 + u(dtype) / U32 / (keys + 1))  # [T, G * d]
    bound += 1.01 * u(dtype) * np.abs(expected) + keys * tiniest(dtype) * 4
    check(ops.attention_context(np, probs, v[None], [(0, group)]), expected, bound, dtype)


GROUPS = [[(0, 1)], [(0, 3)], [(0, 2), (2, 4)], [(0, 1), (1, 3)], [(0, 3), (3, 4)], [(0, 1), (1, 2), (2, 3)]]


@pytest.mark.parametrize("query_groups", GROUPS, ids=str)
@pytest.mark.parametrize(("past", "tokens", "window"), SPANS)
def test_attention_over_ragged_groups(rng, query_groups, past, tokens, window):
    for d in (2, 6, 16):
        check_attention(rng, query_groups, past, tokens, window, d, np.dtype(np.float32))


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=str)
def test_attention_in_16_bits(rng, dtype):
    check_attention(rng, [(0, 1), (1, 3)], 6, 3, 4, 6, dtype)


def check_attention(rng, query_groups, past, tokens, window, d, dtype):
    queries, keys = query_and_key_positions(past, tokens, window)
    heads = query_groups[-1][1]
    q = draw(rng, (heads, tokens, d), dtype)
    k, v = (draw(rng, (len(query_groups), len(keys), d), dtype) for _ in range(2))
    kv_of_head = [kv for kv, (start, stop) in enumerate(query_groups) for _ in range(start, stop)]
    seen = oracle_ops.causal_mask(queries, keys, window)
    expected = oracle_ops.attention(q, k[kv_of_head], v[kv_of_head], seen)
    mask = None if tokens == 1 else ops.causal_mask(np, queries, int(keys[0]), past + tokens, window)
    # A context is a mean of values. In float32 the error of a score is at most about 20 roundings of 10, so
    # that of the mean is 1e-5 of the largest value. In 16 bits the probabilities and the result are also
    # rounded once each. With a wrong head or key the error would be about 1.
    bound = (1e-5 + 2 * u(dtype)) * np.abs(oracle_ops.float64(v)).max()
    probs = ops.softmax(np, ops.attention_scores(np, q, k, query_groups, mask))
    check(ops.attention_context(np, probs, v, query_groups), expected, bound, dtype)


# --- feed-forward ---------------------------------------------------------------------------------------


def check_swiglu(gate, up, dtype):
    expected = oracle_ops.swiglu(gate, up)
    # exp, a sum, a quotient and a product in float32, then one rounding. For gates below -80 the result may
    # be any number below 1e-33 in size, or 0.
    bound = (12 * U32 + u(dtype)) * np.abs(expected) + 1e-30 * np.abs(oracle_ops.float64(up))
    bound += tiniest(dtype)
    check(ops.swiglu(np, np.hstack((gate, up))), expected, bound, dtype)


@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (5, 8), (3, 0)])
@all_dtypes
def test_swiglu(rng, shape, dtype):
    check_swiglu(draw(rng, shape, dtype) * dtype.type(3), draw(rng, shape, dtype), dtype)


@all_dtypes
def test_swiglu_of_large_gates(dtype):
    gate = np.array([[1e3, -1e3, 90, -90, 79, -79, -81, 0]], dtype)
    check_swiglu(gate, np.full_like(gate, 2), dtype)


def test_swiglu_at_plus_and_minus_a_thousand():
    gate = np.array([[1e3, -1e3, 1e3, -1e3]], np.float32)
    check_swiglu(gate, np.array([[1e3, 1e3, -1e3, -1e3]], np.float32), np.dtype(np.float32))
