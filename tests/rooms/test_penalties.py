"""Tests of min-p, penalties and logit bias against their formulas, and of scored prompts."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from engine_requests import run_requests
from tiny import write_tiny

from minitp.comm.single import SingleRank
from minitp.device import open_device
from minitp.errors import InputError
from minitp.generate import generate
from minitp.load import load_model
from minitp.loading.source import open_model
from minitp.request import Request
from minitp.sampling import Sampler, SamplingParams, changed_logits, token_probabilities

CONTEXT = 512
PENALTIES = {
    "bias": {"logit_bias": {"3": 4.5, 7: -100, 19: 0.25}},
    "repetition": {"repetition_penalty": 1.3},
    "reward of repetition": {"repetition_penalty": 0.7},
    "frequency": {"frequency_penalty": 0.8},
    "presence": {"presence_penalty": 1.5},
    "negative": {"presence_penalty": -2, "frequency_penalty": -0.1},
    "all": {
        "logit_bias": {3: 2},
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.4,
        "presence_penalty": 0.3,
    },
}


def reference_logits(logits, prompt, new, params):
    """Return the changed logits [V], computed one token at a time with float32 scalars."""
    changed, counts = [], Counter(new)
    for token, logit in enumerate(logits):
        logit += np.float32((params.logit_bias or {}).get(token, 0))
        if token in prompt or token in new:
            penalty = np.float32(params.repetition_penalty)
            logit = logit / penalty if logit > 0 else logit * penalty
        logit -= np.float32(params.frequency_penalty) * np.float32(counts[token])
        logit -= np.float32(params.presence_penalty) * np.float32(token in counts)
        changed.append(logit)
    return np.array(changed, dtype=np.float32)


@pytest.mark.parametrize("name", PENALTIES)
def test_changed_logits_equal_the_reference(name):
    params, prompt, new = SamplingParams(**PENALTIES[name]), [3, 4, 5, 6], [5, 6, 7, 8, 7]
    counts, seen = np.bincount(new, minlength=20).astype(np.int32), np.zeros(20, bool)  # [V], [V]
    seen[prompt + new] = True
    for seed in range(5):
        logits = np.random.default_rng(seed).normal(scale=5, size=20).astype(np.float32)  # [V]
        changed = changed_logits(logits, params, counts, seen)
        assert changed.dtype == np.float32
        assert np.array_equal(changed, reference_logits(logits, prompt, new, params))


@pytest.mark.parametrize("name", PENALTIES)
def test_greedy_choices_equal_the_argmax_of_the_reference(name):
    params, rng = SamplingParams(**PENALTIES[name]), np.random.default_rng(1)
    prompt, new, unchanged = [2, 2, 9, 11], [], []
    sampler = Sampler(params, prompt)
    for _ in range(60):
        logits = rng.normal(scale=1.5, size=20).astype(np.float32)  # [V]
        kept = logits.copy()
        token = sampler.choose(logits)
        assert token == int(np.argmax(reference_logits(logits, prompt, new, params)))
        assert np.array_equal(logits, kept), "log-probabilities need the caller's logits unchanged"
        new.append(token)
        unchanged.append(int(np.argmax(logits)))
    assert new != unchanged


@pytest.mark.parametrize("name", PENALTIES)
def test_draws_come_from_the_changed_logits(name):
    """Each draw uses one random number, with the probabilities of the reference logits."""
    params, rng = SamplingParams(temperature=0.9, seed=4, **PENALTIES[name]), np.random.default_rng(2)
    prompt, new, uniform = [5, 6], [], np.random.Generator(np.random.PCG64(4))
    sampler = Sampler(params, prompt)
    for _ in range(40):
        logits = rng.normal(scale=2, size=20).astype(np.float32)  # [V]
        probs = token_probabilities(reference_logits(logits, prompt, new, params), params)
        expected = int(np.searchsorted(np.cumsum(probs), uniform.random() * probs.sum(), side="right"))
        new.append(sampler.choose(logits))
        assert new[-1] == expected


def test_min_p_keeps_tokens_by_their_ratio_to_the_best():
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.05, 0.25], dtype=np.float32))
    for min_p, kept in [
        (0, [0, 1, 2, 3, 4]),
        (0.2, [0, 1, 2, 4]),
        (0.45, [1, 2, 4]),
        (0.6, [1, 4]),
        (1, [1]),
    ]:
        probs = token_probabilities(logits, SamplingParams(temperature=1.0, min_p=min_p))
        assert np.flatnonzero(probs).tolist() == kept, min_p
        assert probs.sum() == pytest.approx(1, abs=1e-12)
        expected = np.exp(logits[kept].astype(np.float64))
        np.testing.assert_allclose(probs[kept], expected / expected.sum(), atol=1e-12)


def test_min_p_of_one_keeps_all_equally_probable_tokens():
    probs = token_probabilities(np.array([2, 1, 2], np.float32), SamplingParams(temperature=1.0, min_p=1))
    assert probs.tolist() == [0.5, 0, 0.5]


def test_min_p_is_applied_after_temperature_top_k_and_top_p():
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1], dtype=np.float32))
    # With temperature 0.5 the ratios to the best are squared: 1, 0.25, 0.09, 0.04.
    for options, kept in [
        ({"temperature": 1.0}, [0, 1, 2]),
        ({"temperature": 0.5}, [0, 1]),
        ({"temperature": 1.0, "top_k": 2}, [0, 1]),
        ({"temperature": 1.0, "top_p": 0.5}, [0]),
    ]:
        probs = token_probabilities(logits, SamplingParams(min_p=0.22, **options))
        assert np.flatnonzero(probs).tolist() == kept, options


# --- the same tokens alone, in batches and after preemption ---------------------------------------------

MIXED = [
    {"frequency_penalty": 1.2, "presence_penalty": 0.5},
    {"repetition_penalty": 1.5, "temperature": 0.8, "seed": 3},
    {"temperature": 1.0, "min_p": 0.2, "seed": 1},
    {"logit_bias": {65: 100}},
    {},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = write_tiny(tmp_path_factory.mktemp("model"))
    return load_model(open_model(str(directory), 1), SingleRank(), open_device("float32"))


def fresh(request):
    return Request(request.params, (), request.prompt_ids, CONTEXT)


def test_batches_and_preemption_do_not_change_the_tokens(model):
    """A preempted request continues with the penalties of the tokens that it already has."""
    wanted = [
        Request(SamplingParams(max_new_tokens=30, **options), (), [10 + n, 20, 30], CONTEXT)
        for n, options in enumerate(MIXED)
    ]
    expected = [list(generate(model, request.prompt_ids, fresh(request))) for request in wanted]
    scheduler = run_requests(model, wanted, num_blocks=20, block_size=4)
    assert scheduler.num_preempted > 0
    assert [request.token_ids for request in wanted] == expected
    assert expected[3] == [65] * 30
    assert {request.num_cached_tokens for request in wanted} == {0}, "its own blocks do not count"
    plain = [Request(SamplingParams(max_new_tokens=30), (), r.prompt_ids, CONTEXT) for r in wanted]
    assert all(list(generate(model, p.prompt_ids, p)) != e for p, e in zip(plain[:4], expected, strict=False))


def test_logprobs_are_those_of_the_unchanged_logits(model):
    """A bias that decides the choice does not change the reported log-probability."""
    free = Request(SamplingParams(max_new_tokens=1, logprobs=300), (), [1, 2], CONTEXT)
    list(generate(model, [1, 2], free))
    every = dict(free.logprobs[0][1])
    biased = Request(SamplingParams(max_new_tokens=1, logprobs=1, logit_bias={65: 100}), (), [1, 2], CONTEXT)
    assert list(generate(model, [1, 2], biased)) == [65]
    assert biased.logprobs == [(every[65], free.logprobs[0][1][:1])]


def test_a_bias_on_a_token_that_the_model_lacks_is_rejected(model):
    vocabulary = model.config.vocab_size
    request = Request(SamplingParams(logit_bias={vocabulary: 1}), (), [1], CONTEXT)
    with pytest.raises(InputError, match=f"^logit_bias: token id {vocabulary} is outside the vocabulary"):
        run_requests(model, [request], 10, 4)


# --- scored prompts --------------------------------------------------------------------------------------


def scored_alone(model, prompt, top):
    """Return the log-probabilities of a prompt's tokens, from all logits of one forward pass."""
    cache = model.new_cache(len(prompt))
    logits = np.asarray(model.forward(prompt, cache, slice(None)), np.float64)  # [T, V]
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))  # [T, V]
    found = [None]
    for token, row in zip(prompt[1:], logprobs, strict=False):
        order = np.argsort(-row, kind="stable")[:top]
        found.append((row[token], [(int(t), row[t]) for t in order]))
    return found


def assert_scores(found, expected):
    assert len(found) == len(expected)
    assert found[0] is None
    for (logprob, top), (wanted, wanted_top) in zip(found[1:], expected[1:], strict=True):
        # Products over chunks of other sizes are summed in another order; logits are of order 1.
        assert logprob == pytest.approx(wanted, abs=1e-5)
        assert [x for _, x in top] == pytest.approx([x for _, x in wanted_top], abs=1e-5)
        assert [t for t, _ in top] == [t for t, _ in wanted_top]


@pytest.mark.parametrize(
    ("blocks", "limits"),
    [
        (200, {}),
        (30, {"max_tokens_per_step": 7}),
        (30, {"max_sequences": 2}),
        (22, {"max_tokens_per_step": 33}),  # preempts
    ],
)
def test_every_token_of_a_prompt_is_scored_with_any_cache_and_chunks(model, blocks, limits):
    """Requests whose prompts begin alike are scored or not, so that some find cached blocks."""
    rng = np.random.default_rng(5)
    common = rng.integers(0, 256, 24).tolist()
    prompts = [common + rng.integers(0, 256, n).tolist() for n in (1, 8, 25, 3)] + [[7], [7, 8]]
    wanted = []
    for n, prompt in enumerate(prompts):
        for score in (None, 2):
            params = SamplingParams(max_new_tokens=(n * 5) % 12, prompt_logprobs=score, ignore_eos=True)
            wanted.append(Request(params, (), prompt, CONTEXT))
    run_requests(model, wanted, blocks, 4, **limits)
    for request in wanted:
        if request.params.prompt_logprobs is None:
            assert request.prompt_logprobs == []
        else:
            assert_scores(request.prompt_logprobs, scored_alone(model, request.prompt_ids, 2))
        new = request.params.max_new_tokens
        assert (len(request.token_ids), request.finish_reason) == (new, "length")
        assert request.token_ids == list(generate(model, request.prompt_ids, fresh(request)))


def test_a_long_prompt_is_scored_in_parts_while_others_decode(model):
    """Each batch has few logits, and a decoding sequence gets a token from each batch."""
    long = Request(SamplingParams(max_new_tokens=0, prompt_logprobs=0), (), list(range(200)) * 2, CONTEXT)
    again = Request(long.params, (), long.prompt_ids[::-1], CONTEXT)
    other = Request(SamplingParams(max_new_tokens=20, ignore_eos=True), (), [1, 2, 3], CONTEXT)
    sizes = []
    original = model.forward_batch

    def counted_batch(parts, logits_at, record):
        sizes.append(len(logits_at))
        return original(parts, logits_at, record)

    model.forward_batch = counted_batch
    try:
        run_requests(model, [other, long, again], 300, 4)
    finally:
        del model.forward_batch
    assert max(sizes) == 129
    assert sum(sizes) == 399 + 399 + 20
    assert_scores(long.prompt_logprobs, scored_alone(model, long.prompt_ids, 0))
    assert_scores(again.prompt_logprobs, scored_alone(model, again.prompt_ids, 0))
    assert long.token_ids == again.token_ids == []


def test_a_request_that_is_preempted_within_its_prompt_scores_each_token_once(model):
    older = Request(SamplingParams(max_new_tokens=36, ignore_eos=True), (), [1] * 8, CONTEXT)
    scored = Request(SamplingParams(max_new_tokens=1, prompt_logprobs=1), (), list(range(36)), CONTEXT)
    scheduler = run_requests(model, [older, scored], num_blocks=12, block_size=4, max_tokens_per_step=5)
    assert scheduler.num_preempted == 1
    assert_scores(scored.prompt_logprobs, scored_alone(model, scored.prompt_ids, 1))


def test_the_number_of_cached_tokens_is_reported(model):
    prompt = list(range(30, 60))
    requests = [
        Request(replace(SamplingParams(max_new_tokens=2, ignore_eos=True), **options), (), prompt, CONTEXT)
        for options in ({}, {}, {"prompt_logprobs": 0})
    ]
    run_requests(model, requests, 100, 4, max_sequences=1)
    assert [request.num_cached_tokens for request in requests] == [0, 28, 0]


def test_a_prompt_may_fill_the_context_if_no_new_token_is_requested(model):
    prompt = [1] * CONTEXT
    request = Request(SamplingParams(max_new_tokens=0, prompt_logprobs=0), (), prompt, CONTEXT)
    run_requests(model, [request], 200, 4)
    assert len(request.prompt_logprobs) == CONTEXT
    with pytest.raises(InputError, match=f"{CONTEXT} tokens, which leaves no room"):
        run_requests(model, [Request(SamplingParams(max_new_tokens=1), (), prompt, CONTEXT)], 200, 4)
