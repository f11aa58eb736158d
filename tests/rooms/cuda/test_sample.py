"""Tests of sample.cu, run on the CPU, against `sampling.Sampler`."""

import math

import numpy as np
import pytest
from cuda_on_cpu import CpuCompiler

from minitp.cuda.kernels.sample import CHANGE, RESULTS, WORDS, Sample, history_of, settings_of
from minitp.sampling import Sampler, SamplingParams, changed_logits, token_logprobs, token_probabilities

CLOSE = 1e-12  # distance from a boundary between two tokens within which the order of sums may matter
UNTOUCHED = -99


def sample(logits, params, draw):
    """Sample tokens [B] from logits [B, V] with the kernel; a row with None as its params is padding."""
    return sample_after(logits, params, draw, [((), ())] * len(params))[0]


def sample_after(logits, params, draw, texts):
    """Sample a token for each row after its text, a (prompt ids, new ids).

    The result is (tokens [B], the kernel's `results`, the history of each row or None). The lanes of the rows
    are in another order than the rows.
    """
    rows, size = logits.shape
    wide = np.full((rows, (size + 7) // 4 * 4), np.nan, np.float32)[:, :size]  # [B, V]
    wide[:] = logits
    compiler, lane = CpuCompiler(np.float16), np.arange(rows, dtype=np.int32)[::-1].copy()  # [B]
    settings, histories = np.zeros((rows, WORDS), np.uint64), []
    for row, (one, text) in enumerate(zip(params, texts, strict=True)):
        address, content = 0, lambda: None
        if one is None:
            lane[row] = -1
        elif one.changes_logits:
            address, content = compiler.lend(history_of(one, *text, room=1))
        histories.append(content)
        settings[lane[row]] = settings_of(one or SamplingParams(), address)
    chosen, results = np.full(rows, UNTOUCHED, np.int32), np.full((RESULTS, rows), np.nan)
    Sample(compiler)(wide, lane, settings, np.array(draw, np.float64), chosen, results)
    np.testing.assert_array_equal(wide, logits.astype(np.float32))  # restored
    tokens = np.where(lane < 0, UNTOUCHED, chosen[lane])  # [B]
    np.testing.assert_array_equal(results[0], np.where(lane < 0, np.nan, tokens))
    return tokens, results, [content() for content in histories]


def compare(logits, params, seed=0, texts=None):
    """Sample each row of logits [B, V] by kernel and host with the same draw, and compare the tokens."""
    seeds = seed + np.arange(len(logits))
    draw = [np.random.Generator(np.random.PCG64(s)).random() for s in seeds]
    texts = texts or [((), ())] * len(params)
    tokens, results, histories = sample_after(logits, params, draw, texts)
    right = np.zeros(len(tokens), bool)  # [B]
    for row, (one, number, (prompt, new)) in enumerate(zip(params, seeds, texts, strict=True)):
        changed = after_text(logits[row], one, prompt, new)  # [V]
        # `choose` is given changed logits, so it must not change them again.
        host = Sampler(
            SamplingParams(100, one.temperature, one.top_k, one.top_p, int(number), min_p=one.min_p)
        )
        right[row] = tokens[row] == host.choose(changed) or near(changed, one, draw[row])
    assert right.all()
    near_ones = [
        near(after_text(r, p, *t), p, d) for r, p, t, d in zip(logits, params, texts, draw, strict=True)
    ]
    assert np.mean(near_ones) < 0.05
    return tokens, results, histories


def after_text(logits, params, prompt, new):
    """Return the logits [V] that the host would choose from."""
    counts = np.bincount(np.array(new, np.int32), minlength=len(logits)).astype(np.int32)  # [V]
    seen = counts > 0  # [V]
    seen[list(prompt)] = True
    return changed_logits(logits, params, counts, seen)


def near(logits, params, draw):
    """Return whether the draw is close to a boundary between two tokens, or a token to the limit of min-p."""
    if params.temperature == 0:
        return False
    free = SamplingParams(temperature=params.temperature, top_k=params.top_k, top_p=params.top_p)
    ratios = token_probabilities(logits, free)  # [V]
    ratios /= ratios.max()
    limit = params.min_p
    if limit > 0 and np.abs(ratios[ratios < 1] - limit).min(initial=1) < CLOSE:
        return True
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


# --- min-p, penalties, log-probabilities -----------------------------------------------------------------


@pytest.mark.parametrize("values", [None, [2.0, 1.0, -1.0, 0.5]])
def test_min_p(values):
    params = [
        SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        for temperature in (0.7, 100.0)
        for top_k in (0, 7)
        for top_p in (0.6, 1.0)
        for min_p in (1e-3, 0.2, 0.9, 1.0)
    ] * 3
    draw = np.random.default_rng(0)
    shape = len(params), 300
    logits = draw.normal(size=shape) if values is None else draw.choice(values, size=shape)
    compare(logits.astype(np.float32), params)


CHANGES = [
    {"logit_bias": {3: 4.5, "7": -100, 19: 0.25}},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"frequency_penalty": 0.8},
    {"presence_penalty": 1.5},
    {"presence_penalty": -2, "frequency_penalty": -0.1},
    {
        "logit_bias": {3: 2, 5: 1},
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.4,
        "presence_penalty": 0.3,
    },
    {},
]


def test_changed_logits():
    """Compare greedy and sampled choices after random texts, some longer than a block has threads."""
    rng, params, texts = np.random.default_rng(3), [], []
    for n in range(96):
        temperature = (0.0, 0.8, 1.5)[n % 3]
        params.append(
            SamplingParams(temperature=temperature, min_p=0.01 * (n % 2), **CHANGES[n % len(CHANGES)])
        )
        prompt, new = (rng.integers(0, 600, rng.integers(0, length)).tolist() for length in (900, 40))
        texts.append((prompt, new))
    logits = rng.normal(scale=2, size=(len(params), 600)).astype(np.float32)
    compare(logits, params, texts=texts)


def test_the_kernel_counts_the_tokens_that_it_chooses():
    """Check tokens that are new, that only the prompt or the bias has, and that were chosen before."""
    params = SamplingParams(repetition_penalty=1.1, logit_bias={4: 0.5})
    texts = [((1, 2), (3, 3))] * 4
    logits = np.zeros((4, 8), np.float32)
    for row, token in enumerate((6, 2, 4, 3)):
        logits[row, token] = 9
    tokens, _, histories = sample_after(logits, [params] * 4, [0] * 4, texts)
    assert tokens.tolist() == [6, 2, 4, 3]
    for history, token in zip(histories, tokens.tolist(), strict=True):
        expected = {1: 0, 2: 0, 3: 2, 4: -1}
        expected[token] = max(expected.get(token, 0), 0) + 1
        assert history.dtype == CHANGE
        entries = history[1 : 1 + history["id"][0]]
        assert dict(zip(entries["id"].tolist(), entries["count"].tolist(), strict=True)) == expected


@pytest.mark.parametrize("size", [3, 1000])
def test_log_probabilities_are_those_of_the_unchanged_logits(size):
    rng = np.random.default_rng(size)
    tops = [None, 0, 1, 5, 20] * 3
    params = [SamplingParams(logprobs=top, temperature=0.5 * (n % 2), **CHANGES[n // 5 * 3 % 4 % 2 * 6])
              for n, top in enumerate(tops)]  # fmt: skip
    params = [p if size > 20 else SamplingParams(logprobs=p.logprobs) for p in params]
    logits = rng.choice(np.float32([0, 0.5, -1, 2]), size=(len(tops), size))
    logits[::2] = rng.normal(size=logits[::2].shape)
    logits[4, 0] = -np.inf
    tokens, results, _ = compare(logits, params, texts=[((1, 2), (2,))] * len(tops))
    for token, top, row, found in zip(tokens, tops, logits, results.T, strict=True):
        assert np.isnan(found[1]) == (top is None)
        pairs = found[2:].reshape(-1, 2)  # [20, 2]
        assert np.isnan(pairs[min(top or 0, size) :]).all()
        if top is None:
            continue
        logprob, best = token_logprobs(row, token, top)
        assert found[1] == pytest.approx(logprob, abs=CLOSE)
        assert pairs[: len(best), 0].tolist() == [token for token, _ in best]
        np.testing.assert_allclose(pairs[: len(best), 1], [logprob for _, logprob in best], atol=CLOSE)


def test_log_probabilities_of_tokens_whose_logits_are_changed():
    logits = np.random.default_rng(5).normal(size=(4, 600)).astype(np.float32)
    params = SamplingParams(logprobs=3, repetition_penalty=1.5, frequency_penalty=1)
    _, results, _ = sample_after(logits, [params] * 4, [0.5] * 4, [(range(600), range(600))] * 4)
    for row, found in zip(logits, results.T, strict=True):
        best = token_logprobs(row, 0, 3)[1]
        np.testing.assert_allclose(found[3:8:2], [logprob for _, logprob in best], atol=CLOSE)


def test_rows_that_are_not_aligned_are_rejected():
    with pytest.raises(ValueError, match="7 elements apart"):
        Sample(CpuCompiler(np.float16))(np.zeros((2, 7), np.float32), None, None, None, None, None)
