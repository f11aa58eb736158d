"""SamplingParams refuse what is no value of theirs; logprobs are those of the softmax."""

import math

import numpy as np
import pytest

from minitp.errors import InputError, ParameterError
from minitp.sampling import SamplingParams, token_logprobs

NAN, INF = float("nan"), float("inf")
WRONG = {
    "max_new_tokens": [0, -1, 1.0, "5", None, True, NAN, np.float32(3)],
    "temperature": [-0.1, INF, NAN, "1", None, True, 1j],
    "top_k": [-1, 2.0, "5", None, False],
    "top_p": [0, 0.0, -0.5, 1.01, NAN, "0.5", None, True],
    "seed": [-1, 0.0, "1", True],
    "stop": ["", ("",), ["a", ""], 5, b"a", ("a", 1), [None], None, {"a"}],
    "ignore_eos": [0, 1, None, "yes"],
    "logprobs": [-1, 2.0, "1", True, False],
}
RIGHT = {
    "max_new_tokens": [1, 10**6, np.int64(3)],
    "temperature": [0, 0.0, 1, 5e-324, 1e300, np.float32(0.5)],
    "top_k": [0, 1, 10**6, np.int32(4)],
    "top_p": [1, 1.0, 5e-324, np.float64(0.5)],
    "seed": [None, 0, 2**80, np.uint64(2**63)],
    "stop": [(), [], ("a",), ["a", "bc"]],
    "ignore_eos": [True, False],
    "logprobs": [None, 0, 5, np.int64(5)],
}


def cases(table):
    return [(name, value) for name, values in table.items() for value in values]


@pytest.mark.parametrize(("name", "value"), cases(WRONG), ids=str)
def test_what_is_no_value_of_a_field_is_refused_by_name(name, value):
    with pytest.raises(ParameterError, match=rf"^{name} .*: expected ") as caught:
        SamplingParams(**{name: value})
    assert isinstance(caught.value, InputError)
    shown = (value,) if name == "stop" and isinstance(value, str) else value
    assert str(caught.value).startswith(f"{name} {shown!r}: expected {caught.value.expected}")
    assert (caught.value.name, repr(caught.value.value)) == (name, repr(shown))


@pytest.mark.parametrize(("name", "value"), cases(RIGHT), ids=str)
def test_what_is_a_value_of_a_field_is_taken_as_it_is(name, value):
    assert getattr(SamplingParams(**{name: value}), name) is value


def test_a_single_stop_string_is_one_of_one():
    assert SamplingParams(stop="END").stop == ("END",)


def test_a_temperature_of_zero_is_the_default_and_nothing_is_cut_off():
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.stop) == (0, 0, 1, ())
    assert (params.seed, params.logprobs, params.ignore_eos, params.max_new_tokens) == (
        None,
        None,
        False,
        100,
    )


def test_params_cannot_be_changed_afterwards():
    """So what has been checked stays right."""
    with pytest.raises(AttributeError):
        SamplingParams().temperature = -1


# --- logprobs -------------------------------------------------------------------------------------------


def plain_logprobs(logits):
    """In Python's floats, one by one."""
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
    """Also where exp of a logit, by itself, is too large or too small for any float."""
    logits = np.random.default_rng(0).normal(scale=9, size=300).astype(np.float32) + np.float32(offset)
    _, everyone = token_logprobs(logits, 0, 300)
    assert sorted(t for t, _ in everyone) == list(range(300))
    assert math.fsum(math.exp(x) for _, x in everyone) == pytest.approx(1, abs=1e-12)


def test_of_equally_probable_tokens_the_lower_id_comes_first():
    logits = np.array([1, 3, 2, 3, 2, 3, 0], dtype=np.float32)
    assert [t for t, _ in token_logprobs(logits, 0, 6)[1]] == [1, 3, 5, 2, 4, 0]
    many = np.random.default_rng(0).integers(3, size=2000).astype(np.float32)
    expected = sorted(range(2000), key=lambda token: (-many[token], token))
    assert [t for t, _ in token_logprobs(many, 0, 1500)[1]] == expected[:1500]


def test_the_token_itself_need_not_be_among_the_most_probable():
    logits = np.array([0, 5, 9], dtype=np.float32)
    logprob, top = token_logprobs(logits, 0, 1)
    assert [t for t, _ in top] == [2]
    assert logprob < top[0][1]


def test_none_of_the_most_probable():
    logprob, top = token_logprobs(np.array([0, 0], dtype=np.float32), 1, 0)
    assert (logprob, top) == (pytest.approx(math.log(0.5)), [])


def test_more_than_there_are_gives_all():
    assert [t for t, _ in token_logprobs(np.array([1, 2, 0], dtype=np.float32), 0, 99)[1]] == [1, 0, 2]


def test_numbers_are_pythons_own_and_so_can_be_sent_as_json():
    logprob, top = token_logprobs(np.array([1, 2], dtype=np.float32), 0, 1)
    assert [type(x) for x in (logprob, *top[0])] == [float, int, float]
