"""Tests of fields that clients send: neutral values, sampling, messages, prefilled answers, tokenization."""

import httpx
import pytest
from served import Reference, Served, rendered, write_chatty
from tiny import EOS

from minitp.server.errors import ApiError
from minitp.server.fields import UNSUPPORTED_IN_CHAT, UNSUPPORTED_IN_COMPLETION
from minitp.server.requests import chat_request, completion_request

pytestmark = pytest.mark.mpi
CONTEXT = 96  # tokens, few, because some tests fill it
HTTP = httpx.Client(timeout=60)  # a new one for each request takes longer
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = {"model": "chatty", "prompt": "Hello", "max_tokens": 12, "temperature": 0}
USER = {"role": "user", "content": "Hi"}
TALK = {"model": "chatty", "messages": [USER], "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_chatty(tmp_path_factory.mktemp("models") / "chatty", max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def alone(directory):
    return Reference(directory)


@pytest.fixture(scope="module")
def server(directory):
    served = Served(directory, "--tp", 1)
    yield served
    served.stop()


def choice(server, route, fields):
    """Return the text and the finish reason of a response's only choice."""
    response = HTTP.post(server.url + route, json=fields)
    assert response.status_code == 200, response.text
    (one,) = response.json()["choices"]
    return one["text"] if route == COMPLETIONS else one["message"]["content"], one["finish_reason"]


def refusal(server, route, fields):
    """Return the error object of a response with status 400."""
    response = HTTP.post(server.url + route, json=fields)
    assert response.status_code == 400, response.text
    return response.json()["error"]


# --- values that change nothing -------------------------------------------------------------------------


NEUTRAL = {
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_p": 0,
    "top_k": -1,
    "top_p": 1,
    "seed": -1,
    "logit_bias": {"5": 0},
    "stream_options": {"include_usage": None},
    "top_logprobs": 0,
    "logprobs": False,
    "echo": False,
    "min_tokens": 0,
    "length_penalty": 1.0,
    "use_beam_search": False,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "stop_token_ids": [],
    "bad_words": [],
    "guided_json": None,
    "structured_outputs": {"json": None, "regex": None},
    "prompt_logprobs": None,
    "priority": 0,
    "typical_p": 1,
    "repeat_penalty": 1.0,
    "repeat_last_n": 64,
    "mirostat": 0,
    "mirostat_tau": 5.0,
    "dry_multiplier": 0,
    "dry_sequence_breakers": ["\n", ":"],
    "xtc_probability": 0,
    "xtc_threshold": 0.1,
    "cache_prompt": True,
    "n_probs": 0,
    "tools": None,
    "functions": [],
    "function_call": "auto",
    "tool_choice": "none",
    "response_format": {"type": "text", "json_schema": None},
    "extra_body": {},
    "keep_alive": "5m",
}


@pytest.mark.parametrize("stop", ["", [], [""], ["", None], None])
def test_neutral_values_change_nothing(server, stop):
    assert choice(server, COMPLETIONS, HI | NEUTRAL | {"stop": stop, "best_of": 1}) == choice(
        server, COMPLETIONS, HI
    )
    assert choice(server, CHAT, TALK | NEUTRAL | {"stop": stop}) == choice(server, CHAT, TALK)


@pytest.mark.parametrize(
    ("parse", "body", "table"),
    [(completion_request, HI, UNSUPPORTED_IN_COMPLETION), (chat_request, TALK, UNSUPPORTED_IN_CHAT)],
)
def test_only_values_without_effect_are_accepted_for_unsupported_fields(parse, body, table):
    for name, values in table.items():
        for value in [None, *values]:
            assert parse(body | {name: value}) == parse(body), name
        for value in ("other", 7, {"x": 1}, [1], True, False):
            if not any(value is one for one in values):
                with pytest.raises(ApiError, match=f"^{name}.* is not supported by minitp; leave it out$"):
                    parse(body | {name: value})


def test_best_of_must_be_n():
    assert completion_request(HI | {"best_of": 3, "n": 3}).choices == 3
    with pytest.raises(ApiError, match=r"^best_of 3 is not supported by minitp"):
        completion_request(HI | {"best_of": 3})


def test_the_window_of_penalties_matters_only_with_a_penalty():
    assert completion_request(HI | {"repeat_last_n": 64, "repetition_penalty": 1.0}) == completion_request(HI)
    assert completion_request(HI | {"repeat_last_n": -1, "presence_penalty": 1}).params.presence_penalty == 1
    for penalty in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
        with pytest.raises(ApiError, match=r"^repeat_last_n 64 is not supported"):
            completion_request(HI | {"repeat_last_n": 64, penalty: 1.5})


# --- fields that change the text ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 2},
        {"frequency_penalty": 1.5},
        {"presence_penalty": -2, "frequency_penalty": -2},
        {"repetition_penalty": 1.8},
        {"logit_bias": {"65": 4.5, "66": -100}},
        {"min_p": 0.2, "temperature": 2.0, "seed": 3},
    ],
    ids=str,
)
def test_sampling_parameters_give_the_texts_of_the_model_alone(server, alone, fields):
    fields = {"ignore_eos": True, "max_tokens": 40} | fields
    params = {"temperature": 0, "max_new_tokens": fields.pop("max_tokens")} | fields
    fields["max_tokens"] = params["max_new_tokens"]
    expected = alone.text("Hello", **params)
    plain = alone.text("Hello", max_new_tokens=40, ignore_eos=True)
    assert choice(server, COMPLETIONS, HI | fields)[0] == expected != plain
    expected = alone.text(rendered(("user", "Hi")), **params)
    assert choice(server, CHAT, TALK | fields)[0] == expected


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"logit_bias": {"258": 1}}, "logit_bias: token id 258 is outside the vocabulary, 0 to 257"),
        (
            {"logit_bias": {"five": 1}},
            "logit_bias: expected an object of numbers from -100 to 100 by",
        ),
        ({"logit_bias": {"5": 101}}, "logit_bias: expected"),
        ({"logit_bias": [[5, 1]]}, "logit_bias: expected"),
        ({"presence_penalty": -2.5}, "presence_penalty: expected a number from -2 to 2"),
        ({"frequency_penalty": "1"}, "frequency_penalty: expected a number from -2 to 2"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected a number from 0.01 to 100"),
        ({"min_p": 1.5}, "min_p: expected a number from 0 to 1"),
    ],
    ids=str,
)
def test_sampling_parameters_out_of_range(server, fields, words):
    for route, body in ((COMPLETIONS, HI), (CHAT, TALK)):
        error = refusal(server, route, body | fields)
        assert error["message"].startswith(words)
        assert error["param"] == next(iter(fields))


def test_echo_scores_the_prompt_if_logprobs_are_requested():
    request = completion_request(HI | {"echo": True, "logprobs": 2, "max_tokens": 0})
    assert request.echo
    assert (request.params.prompt_logprobs, request.params.logprobs, request.max_tokens) == (2, 2, 0)
    assert completion_request(HI | {"echo": True}).params.prompt_logprobs is None
    assert completion_request(HI | {"logprobs": 2}).params.prompt_logprobs is None


# --- numbers of tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [-1, -1.0, CONTEXT - 5, CONTEXT - 4, 10**6, 1e12])
def test_max_tokens_beyond_the_context_are_cut_to_it(server, alone, most):
    expected = alone.text("Hello", max_new_tokens=CONTEXT - 5, ignore_eos=True)
    fields = {"ignore_eos": True, "max_tokens": most}
    assert choice(server, COMPLETIONS, HI | fields) == (expected, "length")


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_max_tokens_of_a_chat_are_cut_to_the_context(server, name):
    fields = {"model": "chatty", "messages": [USER], "temperature": 0, "ignore_eos": True}
    whole = choice(server, CHAT, fields)
    assert whole[1] == "length"
    for most in (-1, 10**6):
        assert choice(server, CHAT, fields | {name: most}) == whole


def test_max_tokens_of_zero(server):
    assert choice(server, COMPLETIONS, HI | {"max_tokens": 0}) == ("", "length")
    assert choice(server, COMPLETIONS, HI | {"prompt": "a" * CONTEXT, "max_tokens": 0}) == ("", "length")


@pytest.mark.parametrize(
    ("sent", "meant"), [({"5": 1, "05": 2}, {5: 2}), ({"5": 1, "05": 0}, None), ({"05": 0, "5": 1}, {5: 1})]
)
def test_the_last_bias_of_a_token_counts(sent, meant):
    assert completion_request(HI | {"logit_bias": sent}).params.logit_bias == meant


def test_whole_numbers_may_be_written_with_a_point(server):
    fields = {"max_tokens": 5, "n": 1, "seed": 7, "top_k": 4, "temperature": 1}
    floats = {name: float(value) for name, value in fields.items()}
    assert choice(server, COMPLETIONS, HI | floats) == choice(server, COMPLETIONS, HI | fields)
    body = HI | {"n": 2.0, "logprobs": 3.0, "best_of": 2.0}
    assert completion_request(body) == completion_request(HI | {"n": 2, "logprobs": 3})


@pytest.mark.parametrize("value", [5.5, "5", True, [5], float("inf")], ids=str)
@pytest.mark.parametrize("name", ["max_tokens", "n", "seed", "top_k", "logprobs", "best_of"])
def test_other_values_are_refused_as_whole_numbers(name, value):
    with pytest.raises(ApiError, match=f"^{name}: expected a whole number from -?[01] to "):
        completion_request(HI | {name: value})


# --- messages -------------------------------------------------------------------------------------------


EMPTY = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": []}


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ({"content": None}, ""),
        ({}, ""),
        ({"content": "Yo"} | EMPTY, "Yo"),
        ({"content": "Yo", "tool_calls": None}, "Yo"),
        ({"content": None, "refusal": "No."}, "No."),
    ],
    ids=str,
)
def test_messages_of_assistants(server, alone, message, content):
    messages = [USER, {"role": "assistant"} | message, USER]
    prompt = rendered(("user", "Hi"), ("assistant", content), ("user", "Hi"))
    assert choice(server, CHAT, TALK | {"messages": messages})[0] == alone.text(prompt, max_new_tokens=12)


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("field", "value"), [("tool_calls", [CALL]), ("function_call", CALL["function"]), ("audio", {"id": "1"})]
)
def test_messages_with_calls_are_refused(server, field, value):
    messages = [USER, {"role": "assistant", "content": None, field: value}, USER]
    error = refusal(server, CHAT, TALK | {"messages": messages})
    assert error["message"].startswith(f"messages[1].{field} is not")
    assert error["message"].endswith(" is not supported by minitp; leave it out")
    assert error["param"] == f"messages[1].{field}"


def test_only_an_assistants_message_may_lack_content(server):
    error = refusal(server, CHAT, TALK | {"messages": [{"role": "user", "content": None}]})
    assert error["message"].startswith("messages[0]: expected a role, and content that is a string")


# --- prefilled answers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["Sure, ", "Sure,", ""])
@pytest.mark.parametrize("flags", [{}, {"add_generation_prompt": False}, {"add_generation_prompt": None}])
def test_an_answer_continues_the_final_message(server, alone, text, flags):
    fields = flags | {"continue_final_message": True, "chat_template_kwargs": {"loud": "!"}}
    messages = [USER, {"role": "assistant", "content": text}]
    expected = alone.text(f"[user]Hi\n[assistant]{text}", max_new_tokens=12)
    assert choice(server, CHAT, TALK | fields | {"messages": messages})[0] == expected


def test_add_generation_prompt_is_accepted(server, alone):
    """The template of this model ignores `add_generation_prompt`, so the text stays the same."""
    expected = alone.text(rendered(("user", "Hi")), max_new_tokens=12)
    for flag in (True, False, None):
        assert choice(server, CHAT, TALK | {"add_generation_prompt": flag})[0] == expected


@pytest.mark.parametrize(
    ("fields", "words", "param"),
    [
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt and continue_final_message cannot both be true",
            "add_generation_prompt",
        ),
        ({"continue_final_message": 1}, "continue_final_message: expected true or false", None),
        (
            {"chat_template_kwargs": {"continue_final_message": True}},
            "chat_template_kwargs: expected an object of variables of the chat template, none of them",
            None,
        ),
    ],
)
def test_a_wrong_ending_of_the_prompt_is_refused(server, fields, words, param):
    error = refusal(server, CHAT, TALK | fields)
    assert error["message"].startswith(words)
    assert param in (None, error["param"])


# --- tokenization ---------------------------------------------------------------------------------------


def post(server, route, fields):
    response = HTTP.post(server.url + route, json=fields)
    assert response.status_code == 200, response.text
    return response.json()


def test_tokenize_and_detokenize(server, alone):
    ids = alone.tokenizer.encode("Hé </s>")
    tokens = post(server, "/tokenize", {"prompt": "Hé </s>"})
    assert tokens == {"count": len(ids), "max_model_len": CONTEXT, "tokens": ids}
    assert ids[-1] == EOS
    assert post(server, "/detokenize", {"tokens": ids, "model": "chatty"}) == {"prompt": "Hé </s>"}
    named = {"prompt": "H é", "model": "chatty", "add_special_tokens": False, "return_token_strs": True}
    assert post(server, "/tokenize", named)["token_strs"] == ["H", "Ġ", "Ã", "©"]
    assert post(server, "/tokenize", {"prompt": ""})["tokens"] == []
    assert post(server, "/tokenize", {"prompt": "a" * 100})["count"] == 100, "longer than the context"


def test_tokenize_a_conversation(server, alone):
    talk = {"messages": [USER, {"role": "assistant", "content": "Yo"}]}
    texts = {
        "[user]Hi\n[assistant]Yo\n[assistant]": {},
        "[user]Hi\n[assistant]Yo\n![assistant]": {"chat_template_kwargs": {"loud": "!"}},
        "[user]Hi\n[assistant]Yo": {"continue_final_message": True},
    }
    for text, fields in texts.items():
        assert post(server, "/tokenize", talk | fields)["tokens"] == alone.tokenizer.encode(text)


def test_tokenizer_info(server):
    info = HTTP.get(f"{server.url}/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"], info["pad_token"]) == ("</s>", None, None)
    assert info["chat_template"].startswith("{% for m in messages %}")


@pytest.mark.parametrize(
    ("route", "fields", "words"),
    [
        ("/tokenize", {}, "expected either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": [USER]}, "expected either prompt or messages"),
        ("/tokenize", {"prompt": 5}, "prompt: expected a string"),
        ("/tokenize", {"messages": [{}]}, "messages[0]: expected a role"),
        ("/tokenize", {"prompt": "a", "colour": 1}, "unknown parameter 'colour'"),
        ("/tokenize", {"prompt": "a" * 65537}, "This model's maximum context length is 96 tokens. However,"),
        ("/detokenize", {}, "tokens is missing"),
        ("/detokenize", {"tokens": ["a"]}, "tokens: expected a list of token ids"),
        ("/detokenize", {"tokens": [5] * 513}, "513 tokens exceed the context of 96"),
        ("/detokenize", {"tokens": [258]}, "token id 258 is outside the vocabulary"),
        ("/detokenize", {"tokens": [-1]}, "token id -1 is outside the vocabulary"),
    ],
)
def test_refused_tokenization(server, route, fields, words):
    assert refusal(server, route, fields)["message"].startswith(words)


def test_the_routes_of_tokenization_check_the_model(server):
    response = HTTP.post(f"{server.url}/tokenize", json={"model": "gpt-4", "prompt": "a"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
