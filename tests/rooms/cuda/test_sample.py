"""Tests of sample.cu, run on the CPU, against `sampling.Sampler`."""

import math

import numpy as np
import pytest
from cuda_on_cpu import CpuCompiler

from minitp.cuda.kernels.sample import Sample
from minitp.sampling import Sampler, SamplingParams, token_probabilities

CLOSE = 1e-12  # distance from a boundary between two tokens within which the order of sums may matter
UNTOUCHED = -99


def sample(logits, params, draw):
    """Sample tokens [B] from logits [B, V] with the kernel; a row with None as its params is padding."""
    rows, size = logits.shape
    wide = np.full((rows, (size + 7) // 4 * 4), np.nan, np.float32)[:, :size]  # [B, V]
    wide[:] = logits
    temperature = np.array([-1 if p is None else p.temperature for p in params], np.float64)
    top_k = np.array([0 if p is None else p.top_k for p in params], np.int32)
    top_p = np.array([1 if p is None else p.top_p for p in params], np.float64)
    token = np.full(rows, UNTOUCHED, np.int32)
    Sample(CpuCompiler(np.float16))(wide, temperature, top_k, top_p, np.array(draw, np.float64), token)
    return token


def compare(logits, params, seed=0):
    """Sample each row of logits [B, V] by kernel and host with the same draw, and compare the tokens."""
    seeds = seed + np.arange(len(logits))
    draw = [np.random.Generator(np.random.PCG64(s)).random() for s in seeds]
    tokens = sample(logits, params, draw)
    samplers = [
        Sampler(SamplingParams(p.max_new_tokens, p.temperature, p.top_k, p.top_p, int(s)))
        for p, s in zip(params, seeds, strict=True)
    ]
    expected = np.array([sampler.choose(row) for sampler, row in zip(samplers, logits, strict=True)])
    clear = np.array([not near(*row) for row in zip(logits, params, draw, strict=True)])
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(tokens[clear], expected[clear])


def near(logits, params, draw):
    """Return whether the draw is close to a boundary between two tokens."""
    if params.temperature == 0:
        return False
    probs = token_probabilities(logits, params)  # [V]
    return np.abs(np.cumsum(probs)[probs > 0][:-1] - draw).min(initial=1) < CLOSE


def combinations(size):
    """Return SamplingParams of every kind."""
    return [
        SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
        for temperature in (1e-30, 0.7, 100.0)
        for top_k in (0, 1, 5, size, size + 3)
        for top_p in (1e-6, 0.5, 0.999, 1.0)
    ]


@pytest.mark.parametrize("size", [1, 3, 4, 8, 1000, 1001])
def test_chooses_the_same_tokens_as_the_host(size):
    params = combinations(size) * (4 if size == 8 else 1)
    logits = np.random.default_rng(size).normal(size=(len(params), size), scale=3).astype(np.float32)
    compare(logits, params, seed=size)


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_a_large_vocabulary(scale):
    params = [
        SamplingParams(temperature=0.7, top_k=50, top_p=0.9),
        SamplingParams(temperature=1.0, top_p=0.95),
        SamplingParams(temperature=1.3),
        SamplingParams(temperature=1.0, top_k=20000),
        SamplingParams(temperature=0.0),
    ]
    logits = np.random.default_rng(0).normal(size=(len(params), 32000), scale=scale).astype(np.float32)
    compare(logits, params)


@pytest.mark.parametrize("values", [[0.0], [0.0, -0.0], [2.0, 1.0, -1.0], [3.0, -np.inf], [-1e30, 1.0, 1e30]])
@pytest.mark.parametrize("size", [8, 100])
def test_of_equal_logits_the_lowest_ids_are_kept(values, size):
    params = [
        SamplingParams(temperature=0.7, top_k=top_k, top_p=top_p)
        for top_k in (0, 1, 3, size // 2 + 1)
        for top_p in (0.11, 0.503, math.nextafter(1, 0), 1.0)
    ] * 4
    logits = np.random.default_rng(0).choice(np.float32(values), size=(len(params), size))
    logits[:, size // 3] = max(values)
    compare(logits, params)


def test_logits_that_differ_in_the_last_bit():
    params = [
        SamplingParams(temperature=0.7, top_k=top_k, top_p=top_p)
        for top_k in (0, 17, 250)
        for top_p in (0.3003, 1.0)
    ] * 4
    bits = np.float32(1).view(np.int32) + np.arange(300, dtype=np.int32)  # [V]
    draw = np.random.default_rng(0)
    logits = np.stack([draw.permutation(bits).view(np.float32) for _ in params])  # [B, V]
    logits[::2] *= -1
    compare(logits, params)


def test_every_draw_of_a_distribution():
    """Check both ends of each token's range of draws; tokens dropped by top_k or top_p must not appear."""
    logits = np.float32([0.1, 3.3, 1.7, 3.3, -np.inf, 2.9, 1.7, 1.7])
    for top_k, top_p in ((0, 1.0), (5, 1.0), (6, 0.97), (0, 0.6)):
        params = SamplingParams(temperature=1.5, top_k=top_k, top_p=top_p)
        ends = np.cumsum(token_probabilities(logits, params))  # [V]
        inside = ends[np.diff(ends, prepend=0) > 0]
        draw = np.concatenate([[0], inside[:-1] - CLOSE, inside[:-1] + CLOSE, [math.nextafter(1, 0)]])
        tokens = sample(np.tile(logits, (len(draw), 1)), [params] * len(draw), draw)
        expected = np.minimum(np.searchsorted(ends, draw * ends[-1], side="right"), np.argmax(ends))
        np.testing.assert_array_equal(tokens, expected)


def test_the_last_kept_token_is_chosen_if_rounding_keeps_sums_too_small():
    """Check draws and top_p near 1, which the running sum may never reach because of rounding."""
    almost = math.nextafter(1, 0)
    generator = np.random.default_rng(0)
    top_k = np.arange(41, 241)  # the first 40 logits are larger, the others are equal
    logits = np.repeat(generator.uniform(-2, 0, (200, 1)), 300, axis=1)  # [B, V]
    logits[:, :40] = generator.uniform(0, 1, (200, 40))
    for top_p in (almost, 1.0):
        params = [SamplingParams(temperature=1, top_k=int(k), top_p=top_p) for k in top_k]
        tokens = sample(logits, params, [almost] * len(params))
        np.testing.assert_array_equal(tokens, top_k - 1)


@pytest.mark.parametrize("size", [8, 1000])
def test_greedy_chooses_the_lowest_id_of_equal_logits(size):
    logits = np.random.default_rng(size).integers(-2, 2, (20, size)).astype(np.float32)
    logits[0] = 5
    logits[1] = -np.inf
    logits[2, size - 1] = np.inf
    logits[3, [1, 4]] = 9
    logits[4] = -1000 - np.arange(size)
    logits[5] = -0.0
    logits[5, 3] = 0.0
    tokens = sample(logits, [SamplingParams()] * 20, [0.5] * 20)
    np.testing.assert_array_equal(tokens, np.argmax(logits, axis=1))


@pytest.mark.parametrize(
    "params", [*combinations(40)[20:24], SamplingParams(temperature=1, top_k=3, top_p=0.5)]
)
def test_rows_without_a_distribution_get_the_greedy_choice(params):
    logits = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)
    logits[0, [7, 9]] = np.nan
    logits[1] = np.nan
    logits[2, 30] = -np.float32(np.nan)
    logits[3, 31] = np.inf
    logits[4] = -np.inf
    tokens = sample(logits, [params] * 5, [0.9] * 5)
    np.testing.assert_array_equal(tokens, [7, 0, 30, 31, 0])


def test_padding_keeps_its_token():
    logits = np.zeros((3, 8), np.float32)
    tokens = sample(logits, [None, SamplingParams(), None], [0.5] * 3)
    np.testing.assert_array_equal(tokens, [UNTOUCHED, 0, UNTOUCHED])


def test_rows_that_are_not_aligned_are_rejected():
    with pytest.raises(ValueError, match="7 elements apart"):
        Sample(CpuCompiler(np.float16))(np.zeros((2, 7), np.float32), None, None, None, None, None)
