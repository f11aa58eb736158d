"""Requests that the server rejects; nothing that a client sends may stop the server."""

import json
import signal
import socket
import string
from types import SimpleNamespace

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import Served, rendered, write_chatty
from tiny import write_tiny

from minitp.errors import InputError
from minitp.server.errors import without_path
from minitp.server.fields import CHAT as CHAT_FIELDS
from minitp.server.fields import COMMON, COMPLETION, UNSUPPORTED

pytestmark = pytest.mark.mpi
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = {"model": "chatty", "prompt": "Hi", "max_tokens": 2}
USER = {"role": "user", "content": "Hi"}
TALK = {"model": "chatty", "messages": [USER], "max_tokens": 2}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    served = Served(write_chatty(tmp_path_factory.mktemp("models") / "chatty"), "--tp", 1)
    yield served
    served.stop()


def post(server, route, body, **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | headers
    return httpx.post(server.url + route, content=data, headers=headers, timeout=60)


def check_error(response, status, words, param=None):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert "\n" not in error["message"]
    if param is not None:
        assert error["param"] == param
    return error


BAD_FIELDS = {
    "no model": (COMPLETIONS, {"model": None}, 400, "model", "model is missing"),
    "unknown model": (COMPLETIONS, {"model": "gpt-4"}, 404, "model", "model 'gpt-4' not found"),
    "model no text": (COMPLETIONS, {"model": 4}, 400, "model", "expected the name of a model"),
    "no prompt": (COMPLETIONS, {"prompt": None}, 400, "prompt", "prompt is missing"),
    "empty prompt": (COMPLETIONS, {"prompt": ""}, 400, "prompt", "the prompt is empty"),
    "prompt an object": (COMPLETIONS, {"prompt": {}}, 400, "prompt", "expected a string, a list of"),
    "prompt mixed": (COMPLETIONS, {"prompt": ["a", 1]}, 400, "prompt", "expected a string, a list of"),
    "too many prompts": (COMPLETIONS, {"prompt": ["a"] * 129}, 400, "prompt", "up to 128"),
    "token unknown": (COMPLETIONS, {"prompt": [1, 258]}, 400, "prompt", "258 is outside the vocabulary"),
    "token negative": (COMPLETIONS, {"prompt": [-1]}, 400, "prompt", "-1 is outside the vocabulary"),
    "token huge": (COMPLETIONS, {"prompt": [10**400]}, 400, "prompt", "outside the vocabulary"),
    "prompt too long": (
        COMPLETIONS,
        {"prompt": "a" * 512},
        400,
        "prompt",
        "context length is 512 tokens. However, you requested 513 tokens (512 in the prompt, 1 in the",
    ),
    "max_tokens -2": (COMPLETIONS, {"max_tokens": -2}, 400, "max_tokens", "expected a whole number from -1"),
    "max_tokens text": (COMPLETIONS, {"max_tokens": "9"}, 400, "max_tokens", "expected a whole number"),
    "max_tokens flag": (COMPLETIONS, {"max_tokens": True}, 400, "max_tokens", "expected a whole number"),
    "max_tokens part": (COMPLETIONS, {"max_tokens": 2.5}, 400, "max_tokens", "expected a whole number"),
    "temperature below": (COMPLETIONS, {"temperature": -0.1}, 400, "temperature", "expected a number from 0"),
    "temperature text": (CHAT, {"temperature": "warm"}, 400, "temperature", "expected a number from 0 to 2"),
    "top_p 0": (CHAT, {"top_p": 0}, 400, "top_p", "above 0, up to 1"),
    "n 0": (CHAT, {"n": 0}, 400, "n", "from 1 to 128"),
    "stream text": (CHAT, {"stream": "yes"}, 400, "stream", "expected true or false"),
    "stream_options": (CHAT, {"stream_options": {"x": 1}}, 400, "stream_options", "include_usage"),
    "stop number": (CHAT, {"stop": 3}, 400, "stop", "expected a string of up to"),
    "stop too long": (CHAT, {"stop": "a" * 1025}, 400, "stop", "of up to 1024 characters"),
    "too many stops": (COMPLETIONS, {"stop": ["a"] * 100_000}, 400, "stop", "a list of up to 32"),
    "seed below": (CHAT, {"seed": -2}, 400, "seed", "from -1"),
    "logprobs number": (CHAT, {"logprobs": 3}, 400, "logprobs", "expected true or false"),
    "top_logprobs": (CHAT, {"top_logprobs": 3}, 400, "top_logprobs", "needs logprobs: true"),
    "unknown field": (CHAT, {"temprature": 1}, 400, "temprature", "unknown parameter 'temprature'"),
    "penalty": (CHAT, {"presence_penalty": 2.5}, 400, "presence_penalty", "a number from -2 to 2"),
    "tools": (CHAT, {"tools": [{"type": "function"}]}, 400, "tools", "not supported by minitp"),
    "echo": (CHAT, {"echo": True}, 400, "echo", "echo true is not supported by minitp"),
    "no messages": (CHAT, {"messages": []}, 400, "messages", "expected a list of messages"),
    "message a text": (CHAT, {"messages": ["Hi"]}, 400, "messages[0]", "expected a role, and content"),
    "no role": (CHAT, {"messages": [{"content": "Hi"}]}, 400, "messages[0]", "expected a role"),
    "image": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "messages[0]",
        "does not support images",
    ),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_fields(server, case, stream):
    route, fields, status, param, words = BAD_FIELDS[case]
    body = {**(HI if route == COMPLETIONS else TALK), "stream": stream, **fields}
    check_error(post(server, route, body), status, words, param)


BAD_BODIES = {
    "not JSON": (b"{", 400, "the body is not JSON"),
    "nothing": (b"", 400, "the body is not JSON"),
    "a list": (b"[]", 400, "but not an object"),
    "NaN": (b'{"temperature": NaN}', 400, "NaN is not JSON"),
    "not UTF-8": (b'{"prompt": "\xff"}', 400, "the body is not JSON"),
    "half a character": (b'{"prompt": "\\ud800"}', 400, "the body is not JSON"),
    "very deep": (b"[" * 100_000, 400, "the body is not JSON"),
    "long number": (b'{"n": ' + b"9" * 5000 + b"}", 400, "the body is not JSON"),
    "too large": (b" " * ((1 << 20) + 1), 413, "more than 1048576 bytes"),
}


@pytest.mark.parametrize("case", BAD_BODIES)
def test_bad_bodies(server, case):
    data, status, words = BAD_BODIES[case]
    check_error(post(server, COMPLETIONS, data), status, words)


def test_unsupported_fields_are_accepted_if_they_change_nothing(server):
    nothing = {"presence_penalty": 0, "logit_bias": {}, "user": "me", "tools": [], "stop": None, "seed": None}
    assert post(server, CHAT, TALK | nothing).status_code == 200


def test_other_content_types_than_json_are_rejected(server):
    check_error(post(server, CHAT, TALK, **{"Content-Type": "text/plain"}), 415, "expected application/json")


def test_unknown_routes_and_methods(server):
    check_error(httpx.get(f"{server.url}/v2"), 404, "GET /v2: minitp has no such route, only /, /health, ")
    response = httpx.get(server.url + CHAT)
    check_error(response, 405, "Method Not Allowed")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("length", [512, 65537])
@pytest.mark.parametrize(("route", "param"), [(COMPLETIONS, "prompt"), (CHAT, "messages")])
def test_a_prompt_without_room_has_the_words_that_clients_look_for(server, route, param, length):
    """Check for the first words, which LiteLLM looks for, and for "prompt is too long", as LangChain does."""
    text = "a" * length
    body = HI | {"prompt": text} if route == COMPLETIONS else TALK | {"messages": [USER | {"content": text}]}
    error = check_error(post(server, route, body), 400, "the prompt is too long", param)
    start, end = "This model's maximum context length is 512 tokens. However, ", f"{param} or completion."
    assert error["message"].startswith(start)
    assert error["message"].endswith(f"Please reduce the length of the {end}")
    assert error["code"] == "context_length_exceeded"
    tokens = {COMPLETIONS: 512, CHAT: 512 + len(rendered(("user", "")))}[route]
    if length == 512:
        assert f"you requested {tokens + 1} tokens ({tokens} in the {param}, 1 in the" in error["message"]


@pytest.mark.parametrize(("route", "param"), [(COMPLETIONS, "prompt"), (CHAT, "messages")])
def test_a_prompt_without_new_tokens_may_fill_the_context(server, route, param):
    for length, status in ((512, 200), (513, 400)):
        text = "a" * (length - (0 if route == COMPLETIONS else len(rendered(("user", "")))))
        body = (
            HI | {"prompt": text} if route == COMPLETIONS else TALK | {"messages": [USER | {"content": text}]}
        )
        response = post(server, route, body | {"max_tokens": 0})
        assert response.status_code == status, response.text
    check_error(response, 400, f"you requested 513 tokens (513 in the {param}, 0 in the completion)", param)


@pytest.mark.parametrize(
    ("name", "shown"),
    [("/models/a", "served"), ("./a", "served"), ("org/a", "served"), ("a", "a"), ("model", "model")],
)
def test_only_a_path_is_replaced_in_messages(name, shown):
    llm = SimpleNamespace(source=SimpleNamespace(name=name))
    message = without_path(InputError(f"{name} is not a chat model"), llm, "served")
    assert message == f"{shown} is not a chat model"


def test_the_openai_client_raises_its_usual_errors(server):
    client = server.client()
    with pytest.raises(openai.BadRequestError, match="This model's maximum context length is 512") as caught:
        client.completions.create(model="chatty", prompt="a" * 600)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-4", prompt="Hi")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
NAMES = sorted({*COMMON, *COMPLETION, *CHAT_FIELDS, *UNSUPPORTED} - {"model"})
REPEATABLE = {"deadline": None, "derandomize": True, "database": None}


@settings(max_examples=60, **REPEATABLE, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    route=st.sampled_from([COMPLETIONS, CHAT]),
    fields=st.dictionaries(st.sampled_from(NAMES) | st.text(string.ascii_lowercase), JSON, max_size=4),
)
def test_any_fields(server, route, fields):
    """Send arbitrary fields: the server responds, or blames the client with an error object, and goes on."""
    response = post(server, route, (HI if route == COMPLETIONS else TALK) | fields)
    if response.status_code != 200:
        assert 400 <= response.status_code < 500, response.text
        check_error(response, response.status_code, "")


@settings(max_examples=40, **REPEATABLE, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes(server, data):
    response = post(server, CHAT, data)
    assert 400 <= response.status_code < 500
    check_error(response, response.status_code, "")


@pytest.mark.parametrize(
    "data", [b"\0\0\0\0\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\n"]
)
def test_connections_that_do_not_speak_http(server, data):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass
    assert post(server, COMPLETIONS, HI).status_code == 200


def test_a_body_shorter_than_its_content_length(server):
    host, port = server.url.removeprefix("http://").split(":")
    head = "POST /v1/completions HTTP/1.1|Host: x|Content-Type: application/json|Content-Length: 99||{"
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head.replace("|", "\r\n").encode())
    assert post(server, COMPLETIONS, HI).status_code == 200


def test_a_model_without_chat_template_completes_and_does_not_chat(tmp_path):
    served = Served(write_tiny(tmp_path / "chatty"), "--tp", 1)
    assert post(served, COMPLETIONS, HI).status_code == 200
    words = "chatty has no chat template, so it cannot chat; ask for a completion, or use a chat model"
    assert check_error(post(served, CHAT, TALK), 400, words)["message"] == words
    served.stop()


@pytest.mark.parametrize(
    ("template", "reason"),
    [("{% for %}", "is not valid"), ("{{ unknown.name }}", "fails"), ("{{ bos_token + 'x' }}", "fails")],
)
def test_a_chat_template_that_cannot_be_rendered_is_refused_at_the_start(refused, tmp_path, template, reason):
    model = write_chatty(tmp_path / "chatty")
    (model / "chat_template.jinja").write_text(template)
    before = signal.getsignal(signal.SIGINT)
    assert f"the chat template of {model} {reason}: " in refused("serve", "--model", model, "--port", 0)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_chat_template_that_rejects_short_conversations_is_served(tmp_path):
    model = write_chatty(tmp_path / "chatty")
    (model / "chat_template.jinja").write_text("{{ raise_exception('short') }}")
    served = Served(model, "--tp", 1)
    check_error(post(served, CHAT, TALK), 400, "rejects these messages: short")
    served.stop()


def test_a_model_without_tokenizer_takes_token_ids(tmp_path):
    served = Served(write_tiny(tmp_path / "chatty", tokenizer=False), "--tp", 1)
    check_error(post(served, COMPLETIONS, HI), 400, "no tokenizer.json")
    answer = post(served, COMPLETIONS, HI | {"prompt": [1, 2, 3], "logprobs": 1, "ignore_eos": True}).json()
    assert answer["usage"]["completion_tokens"] == 2
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 2
    served.stop()


def test_api_key_and_variables_of_the_chat_template(tmp_path):
    loud = ["--chat-template-kwargs", '{"loud": "!"}']
    served = Served(write_chatty(tmp_path / "chatty"), "--tp", 1, *loud, MINITP_API_KEY="secret")
    for key in ("none", "secre", "secret2"):
        with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong") as caught:
            served.client(api_key=key).models.list()
        assert caught.value.code == "invalid_api_key"
    check_error(post(served, CHAT, b"{"), 401, "API key")
    client = served.client(api_key="secret")
    assert client.models.list().data[0].id == "chatty"
    answer = client.chat.completions.create(**TALK)
    assert answer.choices[0].message.content is not None
    quiet = client.chat.completions.create(**TALK, extra_body={"chat_template_kwargs": {"loud": ""}})
    assert quiet.usage.prompt_tokens == answer.usage.prompt_tokens - 1
    assert httpx.get(f"{served.url}/health").status_code == 200
    served.stop()
