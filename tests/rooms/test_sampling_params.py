"""Tests of SamplingParams, which refuse invalid values, and of log-probabilities."""

import argparse
import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from minitp.cli.options import add_sampling
from minitp.errors import InputError, ParameterError, shown
from minitp.sampling import MAX_STOP_LENGTH, MAX_STOPS, SamplingParams, token_logprobs

NAN, INF = float("nan"), float("inf")
INVALID = {
    "max_new_tokens": [-1, 1.0, "5", None, True, NAN, np.float32(3)],
    "temperature": [-0.1, INF, NAN, "1", None, True, 1j],
    "top_k": [-1, 2.0, "5", None, False],
    "top_p": [0, 0.0, -0.5, 1.01, NAN, "0.5", None, True],
    "seed": [-1, 0.0, "1", True],
    "stop": ["", ("",), ["a", ""], 5, b"a", ("a", 1), [None], None, {"a"}, "a" * 1025, ["a"] * 33],
    "ignore_eos": [0, 1, None, "yes"],
    "logprobs": [-1, 2.0, "1", True, False],
    "min_p": [-0.1, 1.1, NAN, "0.1", None, True],
    "presence_penalty": [-2.1, 2.1, NAN, "1", None, False],
    "frequency_penalty": [-2.1, 2.1, INF, "1", None, False],
    "repetition_penalty": [0, 0.0, -1, 1e-9, 101, INF, NAN, "1", None, True],
    "logit_bias": [[], "5", {-1: 0}, {"-1": 0}, {"a": 0}, {"٥": 0}, {1.0: 0}, {True: 0}, {"9" * 19: 0}],
    "prompt_logprobs": [-1, 2.0, "1", True, False],
}
VALID = {
    "max_new_tokens": [0, 1, 10**6, np.int64(3)],
    "temperature": [0, 0.0, 1, 5e-324, 1e300, np.float32(0.5)],
    "top_k": [0, 1, 10**6, np.int32(4)],
    "top_p": [1, 1.0, 5e-324, np.float64(0.5)],
    "seed": [None, 0, 2**80, np.uint64(2**63)],
    "stop": [(), [], ("a",), ["a", "bc"], ["a" * 1024] * 32],
    "ignore_eos": [True, False],
    "logprobs": [None, 0, 5, np.int64(5)],
    "min_p": [0, 1, 0.05, np.float32(0.5)],
    "presence_penalty": [-2, 0, 2.0],
    "frequency_penalty": [-2, 0, np.float64(0.5)],
    "repetition_penalty": [0.01, 1, 1.3, 100],
    "logit_bias": [None],
    "prompt_logprobs": [None, 0, 5],
}


def cases(table):
    return [(name, value) for name, values in table.items() for value in values]


@pytest.mark.parametrize(("name", "value"), cases(INVALID), ids=lambda x: f"{x!s:.40}")
def test_an_invalid_value_is_rejected_with_its_name(name, value):
    with pytest.raises(ParameterError, match=rf"^{name} .*: expected ") as caught:
        SamplingParams(**{name: value})
    assert isinstance(caught.value, InputError)
    kept = (value,) if name == "stop" and isinstance(value, str) else value
    assert str(caught.value) == f"{name} {shown(kept)}: expected {caught.value.expected}"
    assert (caught.value.name, repr(caught.value.value)) == (name, repr(kept))


@pytest.mark.parametrize(("name", "value"), cases(VALID), ids=lambda x: f"{x!s:.40}")
def test_a_valid_value_is_kept_unchanged(name, value):
    assert getattr(SamplingParams(**{name: value}), name) is value


def test_logit_bias_has_whole_numbers_as_ids_even_if_json_made_them_strings():
    given = {"5": 1, 7: np.float32(-100), np.int64(8): 2}
    params = SamplingParams(logit_bias=given)
    assert params.logit_bias == {5: 1.0, 7: -100.0, 8: 2.0}
    assert [type(token) for token in params.logit_bias] == [int] * 3
    again = SamplingParams(**{**json.loads(json.dumps(asdict(params))), "stop": ()})
    assert again == params
    assert hash(again) == hash(params)


@pytest.mark.parametrize("bias", [100.5, -101, NAN, "1", None, True])
def test_a_bias_is_a_number_from_minus_100_to_100(bias):
    with pytest.raises(ParameterError, match="numbers from -100 to 100 by token id"):
        SamplingParams(logit_bias={5: bias})


@pytest.mark.parametrize(
    ("fields", "changes", "host"),
    [
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.5, "seed": 1, "logit_bias": {}}, False, False),
        ({"logprobs": 20, "min_p": 0.1}, False, False),
        ({"logprobs": 21}, False, True),
        ({"presence_penalty": -1}, True, False),
        ({"frequency_penalty": 0.1}, True, False),
        ({"repetition_penalty": 1.1}, True, False),
        ({"logit_bias": {0: 0}}, True, False),
    ],
    ids=str,
)
def test_which_options_change_logits_and_which_a_gpu_leaves_to_the_host(fields, changes, host):
    params = SamplingParams(**fields)
    assert (params.changes_logits, params.needs_host) == (changes, host)


def test_a_single_stop_string_becomes_a_tuple():
    assert SamplingParams(stop="END").stop == ("END",)


def test_the_help_of_stop_states_its_limits():
    parser = argparse.ArgumentParser()
    parser.groups = {"sampling": parser}
    add_sampling(parser, max_new_tokens=1)
    assert f"up to {MAX_STOP_LENGTH} characters; can be repeated up to {MAX_STOPS} times" in " ".join(
        parser.format_help().split()
    )


def test_defaults():
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.stop) == (0, 0, 1, ())
    assert (params.seed, params.logprobs, params.ignore_eos) == (None, None, False)
    assert params.max_new_tokens == 100


def test_params_are_immutable():
    """A value that has been checked stays valid."""
    with pytest.raises(AttributeError):
        SamplingParams().temperature = -1


# --- logprobs -------------------------------------------------------------------------------------------


def plain_logprobs(logits):
    """Return the log-probabilities of all tokens, computed one by one with Python floats."""
    total = math.fsum(math.exp(float(x)) for x in logits)
    return [float(x) - math.log(total) for x in logits]


@pytest.mark.parametrize("seed", range(5))
def test_logprobs_against_a_plain_softmax(seed):
    logits = np.random.default_rng(seed).normal(scale=4, size=50).astype(np.float32)
    expected = plain_logprobs(logits)
    order = sorted(range(50), key=lambda token: -expected[token])
    for token in (0, 17, 49):
        logprob, top = token_logprobs(logits, token, 7)
        assert logprob == pytest.approx(expected[token], abs=1e-12)
        assert [t for t, _ in top] == order[:7]
        assert [x for _, x in top] == pytest.approx([expected[t] for t in order[:7]], abs=1e-12)


@pytest.mark.parametrize("offset", [0, 300, -300, 20000], ids="all logits higher by {}".format)
def test_probabilities_of_all_tokens_add_up_to_one(offset):
    """The sum must be 1 even if the exp of a logit is too large or too small for a float."""
    logits = np.random.default_rng(0).normal(scale=9, size=300).astype(np.float32) + np.float32(offset)
    _, top = token_logprobs(logits, 0, 300)
    assert sorted(t for t, _ in top) == list(range(300))
    assert math.fsum(math.exp(x) for _, x in top) == pytest.approx(1, abs=1e-12)


def test_ties_are_ordered_by_token_id():
    logits = np.array([1, 3, 2, 3, 2, 3, 0], dtype=np.float32)
    assert [t for t, _ in token_logprobs(logits, 0, 6)[1]] == [1, 3, 5, 2, 4, 0]
    many = np.random.default_rng(0).integers(3, size=2000).astype(np.float32)
    expected = sorted(range(2000), key=lambda token: (-many[token], token))
    assert [t for t, _ in token_logprobs(many, 0, 1500)[1]] == expected[:1500]


def test_the_chosen_token_may_not_be_among_the_most_probable():
    logits = np.array([0, 5, 9], dtype=np.float32)
    logprob, top = token_logprobs(logits, 0, 1)
    assert [t for t, _ in top] == [2]
    assert logprob < top[0][1]


def test_no_most_probable_tokens_with_top_0():
    logprob, top = token_logprobs(np.array([0, 0], dtype=np.float32), 1, 0)
    assert (logprob, top) == (pytest.approx(math.log(0.5)), [])


def test_top_larger_than_the_vocabulary_gives_all_tokens():
    assert [t for t, _ in token_logprobs(np.array([1, 2, 0], dtype=np.float32), 0, 99)[1]] == [1, 0, 2]


def test_results_are_python_numbers_that_json_can_write():
    logprob, top = token_logprobs(np.array([1, 2], dtype=np.float32), 0, 1)
    assert [type(x) for x in (logprob, *top[0])] == [float, int, float]
