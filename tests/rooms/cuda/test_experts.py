"""Tests of the kernels for a mixture of experts, run on the CPU, against the functions of `moe`."""

import ml_dtypes
import numpy as np
import pytest
from cuda_on_cpu import CpuCompiler

from minitp import moe, ops
from minitp.cuda.kernels.expert_linear import ExpertLinear, ExpertMatrices
from minitp.cuda.kernels.expert_sum import ExpertSum
from minitp.cuda.kernels.route import Route, new_routing

DTYPE = np.dtype(ml_dtypes.bfloat16)
COMPILER = CpuCompiler(DTYPE)
LINEAR, SUM = ExpertLinear(COMPILER), ExpertSum(COMPILER)
EXPERTS, PER_TOKEN, WIDTH, COLUMNS = 5, 2, 48, 21  # E, X, D, F_r
PADDED = 24  # COLUMNS with padding


def routed(logits, per_token, normalized=True, seen=None):
    """Return the Routing that the kernel makes of logits [T, E]."""
    tokens, experts = logits.shape
    routing = new_routing(np, tokens, experts, per_token)
    for array in (routing.chosen, routing.weights, routing.position, routing.token_of, routing.slots):
        array[...] = 77  # whatever an earlier pass has left
    Route(COMPILER, np, normalized)(logits, routing, seen)
    return routing


def assert_sorted(routing, chosen):
    """Check the rows and the slots of a Routing for the experts `chosen` [T, X] of tokens without padding."""
    pairs = [(expert, token) for token, experts in enumerate(chosen) for expert in experts]
    order = sorted(pairs)
    assert [order.index(pair) for pair in pairs] == routing.position.reshape(-1).tolist()
    assert [token for _, token in order] == routing.token_of.tolist()
    covered = []
    for expert, first, rows, _ in routing.slots.tolist():
        assert 0 <= rows <= routing.slot_rows
        covered += [(expert, row) for row in range(first, first + rows)]
    assert covered == [(expert, row) for row, (expert, _) in enumerate(order)]


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(
    ("tokens", "experts", "per_token"),
    [(1, 5, 2), (3, 4, 4), (70, 3, 2), (9, 40, 6)],
)
def test_the_experts_and_their_weights(tokens, experts, per_token, normalized):
    random = np.random.default_rng(tokens)
    logits = (3 * random.normal(size=(tokens, experts))).astype(DTYPE)
    logits[:, 1:] = np.where(random.random((tokens, experts - 1)) < 0.4, logits[:, :1], logits[:, 1:])  # ties
    routing = routed(logits, per_token, normalized)
    chosen, weights = moe.route(np, logits, per_token, normalized)
    np.testing.assert_array_equal(routing.chosen, chosen)
    np.testing.assert_allclose(routing.weights, weights, rtol=2e-6)
    assert_sorted(routing, chosen)


def test_unusual_logits():
    rows = [
        [0.0, -0.0, -1.0, 0.0],
        [-np.inf] * 4,
        [1.0, -np.inf, -np.inf, -np.inf],
        [1.0, np.nan, 2.0, np.inf],
    ]
    logits = np.array(rows, DTYPE)
    with np.errstate(invalid="ignore"):
        chosen, weights = moe.route(np, logits, 2)
    routing = routed(logits, 2)
    np.testing.assert_array_equal(routing.chosen[:3], chosen[:3])
    assert routing.chosen[3].tolist() == [1, 3]  # two different experts, whatever the logits
    np.testing.assert_allclose(routing.weights[:3], weights[:3], rtol=1e-6)
    assert np.isnan(routing.weights[3]).all()


def test_padding_gets_no_expert():
    logits = np.zeros((4, EXPERTS), DTYPE)
    logits[2, 4] = 1
    routing = routed(logits, 2, seen=np.array([1, 0, 9, 0], np.int32))
    assert routing.chosen.tolist() == [[0, 1], [-1, -1], [0, 4], [-1, -1]]
    assert routing.position.tolist() == [[0, 2], [-1, -1], [1, 3], [-1, -1]]
    assert routing.token_of[:4].tolist() == [0, 2, 0, 2]
    used = [slot[:3] for slot in routing.slots.tolist() if slot[2]]
    assert used == [[0, 0, 2], [1, 2, 1], [4, 3, 1]]


@pytest.fixture(scope="module")
def weights():
    """The matrices of all experts as the loader stores them: [E, 2 F, D] and [E, D, F and padding]."""
    random = np.random.default_rng(0)
    gate_up = random.normal(size=(EXPERTS, 2 * COLUMNS, WIDTH)) / WIDTH**0.5
    down = np.zeros((EXPERTS, WIDTH, PADDED))
    down[:, :, :COLUMNS] = random.normal(size=(EXPERTS, WIDTH, COLUMNS)) / COLUMNS**0.5
    return gate_up.astype(DTYPE), down.astype(DTYPE)


def matrices(weights):
    offsets = np.arange(len(weights), dtype=np.int64) * weights[0].size
    return ExpertMatrices(weights[0], offsets)


def block(x, logits, weights, norm=None, seen=None, out=None):
    """Return act [T, X, F and padding] and the sums [T, D] of the experts' block that the kernels compute."""
    routing = routed(logits, PER_TOKEN, seen=seen)
    rows = len(x) * PER_TOKEN
    act, y = np.zeros((rows, PADDED), DTYPE), np.full((1 + rows, WIDTH + 4), np.nan, np.float32)[1:]
    LINEAR.swiglu(x, matrices(weights[0]), routing, act, norm)
    assert not act[:, COLUMNS:].any()
    LINEAR.down(act, matrices(weights[1]), routing, y)
    assert np.isnan(y[:, WIDTH:]).all()
    adds = out is not None
    out = out if adds else np.full((len(x), WIDTH + 8), np.nan, DTYPE)
    SUM(y[:, :WIDTH], routing, out, adds)
    assert adds or np.isnan(out[:, WIDTH:]).all()
    return act[routing.position], out[:, :WIDTH]


def draw(tokens):
    random = np.random.default_rng(tokens)
    x = random.normal(size=(tokens, WIDTH)).astype(DTYPE)
    return x, random.normal(size=(tokens, EXPERTS)).astype(DTYPE)


def assert_close(actual, expected):
    """Check equality up to the order of sums, which may round values near a tie to the other side."""
    actual, expected = (array.astype(np.float32) for array in (actual, expected))
    np.testing.assert_allclose(actual, expected, rtol=0.02, atol=0.01)
    assert (actual == expected).mean() > 0.9


@pytest.mark.parametrize("tokens", [1, 6, 70])
def test_the_block(weights, tokens):
    x, logits = draw(tokens)
    act, out = block(x, logits, weights)
    chosen, shares = moe.route(np, logits, PER_TOKEN)
    expected = moe.experts_act(np, x, chosen, [w.T for w in weights[0]])
    assert_close(act[:, :, :COLUMNS], expected)
    down = [w[:, :COLUMNS].T for w in weights[1]]
    partial = moe.experts_partial(np, act[:, :, :COLUMNS], chosen, shares, down)
    assert_close(out, partial)


def test_the_norm_of_one_token(weights):
    x, logits = draw(1)
    norm = (1 + draw(2)[0][0] / 8).astype(DTYPE), 1e-5
    fused, separate = block(x, logits, weights, norm), block(ops.rms_norm(np, x, *norm), logits, weights)
    for one, other in zip(fused, separate, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_residual_addition(weights):
    x, logits = draw(6)
    stream = draw(7)[0][:6].copy()
    expected = stream + block(x, logits, weights)[1]
    np.testing.assert_array_equal(block(x, logits, weights, out=stream)[1], expected)


def test_a_tokens_bits_do_not_depend_on_the_rest_of_the_batch(weights):
    """Check a token alone, in batches that share its experts or choose others, and next to padding."""
    x, logits = draw(40)
    act, out = block(x, logits, weights)
    same = np.repeat(logits[:1], 40, axis=0)  # all tokens choose the experts of the first
    seen = np.ones(40, np.int32)
    seen[1::2] = 0
    for found in (
        block(x[:1], logits[:1], weights),
        block(x, same, weights),
        block(x, logits, weights, seen=seen),
        block(np.tile(x, (2, 1)), np.tile(logits, (2, 1)), weights),  # more than one slot for an expert
    ):
        np.testing.assert_array_equal(found[0][0], act[0])
        np.testing.assert_array_equal(found[1][0], out[0])
    padded = block(x, logits, weights, seen=seen)[1]
    np.testing.assert_array_equal(padded[::2], out[::2])
    assert not padded[1::2].any()


def test_only_the_weights_of_chosen_experts_are_read(weights):
    """Check the number of matrices that the blocks read, and that NaN in the others does not matter."""
    for tokens, read in ((1, PER_TOKEN), (3, None), (40, EXPERTS)):
        x, logits = draw(tokens)
        chosen = np.unique(moe.route(np, logits, PER_TOKEN)[0])
        slots = routed(logits, PER_TOKEN).slots
        assert slots[slots[:, 2] > 0, 0].tolist() == chosen.tolist()  # each is read by one slot, so once
        assert read in (None, len(chosen))
        poisoned = [w.copy() for w in weights]
        for w in poisoned:
            w[np.setdiff1d(np.arange(EXPERTS), chosen)] = np.nan
        for one, other in zip(block(x, logits, poisoned), block(x, logits, weights), strict=True):
            np.testing.assert_array_equal(one, other)
