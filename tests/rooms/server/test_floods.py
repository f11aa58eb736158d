"""Requests that would stop the server for others: what is refused early, what runs outside the event loop.

benchmarks/server_floods.py measures what other clients notice.
"""

import asyncio
import json
import threading
from types import SimpleNamespace

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer

from minitp.engine.ranks import Update
from minitp.errors import ContextError
from minitp.llm import LLM
from minitp.request import CHARACTERS_PER_TOKEN
from minitp.server import app as app_module
from minitp.server import body
from minitp.server.app import make_app
from minitp.server.backend import AdmissionLimits, Backend
from minitp.server.responses import json_pieces
from minitp.text.tokenizer import LONG_TEXT, Tokenizer

COMPLETIONS = "/v1/completions"
HI = {"model": "fake", "prompt": "Hi", "max_tokens": 1}
MEGABYTE = 1 << 20
CONFIG = SimpleNamespace(vocab_size=3)


class FakeLLM:
    """An LLM whose answers have one token; `held` names a method that waits until `release` is set."""

    replicas = ()

    def __init__(self, held=None, context=512):
        self.description, self.source = {"context": context}, SimpleNamespace(name="fake", config=CONFIG)
        self.tokenizer, self.encoded = self, 0
        self.held, self.entered, self.release = held, threading.Semaphore(0), threading.Event()

    def wait_if(self, name):
        if name == self.held:
            self.entered.release()
            assert self.release.wait(10)

    def encode(self, prompt, room):
        self.encoded += 1
        self.wait_if("encode")
        return [1] * len(prompt)

    def token_bytes(self, token):
        return self.token_text(token).encode()

    def is_special(self, token):
        return False

    def submit_all(self, ids, requests):
        self.wait_if("submit")
        for _, listener in requests:
            listener(Update([1], "x", [(-1.0, [(2, -1.0)])], finish_reason="length"))
        return [lambda: None] * len(requests)

    def token_text(self, token):
        self.wait_if("token_text")
        return "x"

    def close(self):
        pass


def serve(llm, use, sequences=8):
    """Call use(client) with a client of a server of this LLM; return its result."""

    async def run():
        backend = Backend(lambda on_end: llm, str, AdmissionLimits(sequences, 60))
        backend.state, backend.llm = "ready", llm
        app = make_app(backend, FakeMetrics(), ["fake"])
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await use(client)

    return asyncio.run(run())


class FakeMetrics:
    """Metrics that record nothing."""

    def __getattr__(self, name):
        return self

    def __call__(self, *_):
        return self


def post(client, fields):
    return client.post(COMPLETIONS, json=fields)


# --- refused early -----------------------------------------------------------------------------------------


async def body_of(megabytes, read):
    """Yield a body of spaces, and append to `read` the number of bytes read so far."""
    for _ in range(16 * megabytes):
        read.append(len(read) + MEGABYTE // 16)
        yield b" " * (MEGABYTE // 16)


@pytest.mark.parametrize("announced", [True, False], ids=["Content-Length", "chunked"])
def test_a_body_over_the_limit_is_not_read(announced):
    read, headers = [], {"Content-Type": "application/json"}
    if announced:
        headers["Content-Length"] = str(5 * MEGABYTE)

    def use(client):
        return client.post(COMPLETIONS, content=body_of(5, read), headers=headers)

    answer = serve(FakeLLM(), use)
    assert (answer.status_code, answer.json()["error"]["type"]) == (413, "invalid_request_error")
    assert "more than 1048576 bytes" in answer.json()["error"]["message"]
    assert len(read) == (0 if announced else 17), "the limit is 16 pieces"


@pytest.mark.parametrize(
    ("context", "prompts", "megabytes"), [(512, 8, 1), (8192, 8, 1), (8192, 128, 8), (1 << 20, 8, 16)]
)
def test_the_limit_of_a_body_follows_from_the_context(context, prompts, megabytes):
    """A body may hold one prompt that fills the context, as ids or escaped text, or 8 MiB of prompts."""
    assert body.largest_body(context, prompts) == megabytes * MEGABYTE


@pytest.mark.parametrize(
    ("fields", "status"),
    [({"n": 9}, 400), ({"prompt": ["a"] * 9}, 400), ({"prompt": ["a"] * 3, "n": 3}, 400)],
)
def test_too_many_sequences_are_refused_before_they_are_tokenized(fields, status):
    llm = FakeLLM()
    assert serve(llm, lambda client: post(client, HI | fields)).status_code == status
    assert llm.encoded == 0


class NoTokenizer:
    """A tokenizer that must not be used."""

    def encode(self, text, **_):
        raise AssertionError(f"{len(text)} characters were tokenized")


def test_a_text_too_long_for_the_context_is_refused_before_it_is_tokenized():
    llm = LLM.__new__(LLM)
    llm.tokenizer, llm.description = NoTokenizer(), {"context": 16}
    llm.__dict__["chat_template"] = SimpleNamespace(render=lambda messages, *_: messages[0]["content"])
    text = "a" * (16 * CHARACTERS_PER_TOKEN + 1)
    for refused in (lambda: llm.encode(text), lambda: llm.encode_chat([{"role": "user", "content": text}])):
        with pytest.raises(ContextError, match="2049 characters, which is too long for a context of 16 tok"):
            refused()
    with pytest.raises(AssertionError, match="2048 characters were tokenized"):
        llm.encode(text[1:])


# --- outside the event loop --------------------------------------------------------------------------------


@pytest.mark.parametrize("held", ["read_json", "encode", "make_sequences", "submit", "token_text"])
def test_health_answers_while_a_request_is_being_handled(held, monkeypatch):
    """The server parses, tokenizes, sends to rank 0 and writes the response outside the event loop."""
    llm = FakeLLM(held)

    def hold(name):
        function = getattr(app_module, name)

        def held_function(*arguments):
            llm.wait_if(name)
            return function(*arguments)

        monkeypatch.setattr(app_module, name, held_function)

    hold("read_json")
    hold("make_sequences")

    async def use(client):
        answer = asyncio.ensure_future(post(client, HI | {"logprobs": 1}))
        try:
            assert await asyncio.to_thread(llm.entered.acquire, timeout=5)
            assert (await asyncio.wait_for(client.get("/health"), 5)).status_code == 200
            assert not answer.done()
        finally:
            llm.release.set()
        return await answer

    timer = threading.Timer(3, llm.release.set)  # so that a blocked event loop fails instead of hanging
    timer.start()
    assert serve(llm, use).json()["choices"][0]["text"] == "x"
    assert timer.is_alive(), "the event loop was blocked"
    timer.cancel()


def test_few_requests_are_tokenized_at_the_same_time():
    llm = FakeLLM("encode")

    async def use(client):
        answers = [asyncio.ensure_future(post(client, HI)) for _ in range(6)]
        for _ in range(4):
            assert await asyncio.to_thread(llm.entered.acquire, timeout=5)
        assert not await asyncio.to_thread(llm.entered.acquire, timeout=0.1)
        llm.release.set()
        return [(await answer).status_code for answer in answers]

    assert serve(llm, use) == [200] * 6
    assert llm.encoded == 6


@pytest.mark.parametrize("text", ["Grüße 😀 " * 2000, "a" * LONG_TEXT, " " * (LONG_TEXT - 1)])
@pytest.mark.parametrize("special", [True, False])
def test_long_texts_have_the_same_tokens(text, special):
    """A long text is tokenized by another function of the library, which lets other threads run."""
    tokenizer = byte_tokenizer(bos=True)
    expected = tokenizer.encode(text, add_special_tokens=special).ids
    assert Tokenizer(tokenizer).encode(text, add_special_tokens=special) == expected


# --- JSON --------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def read_in_python():
    """Return `read_json` with all bodies parsed in Python, as large ones are."""
    patch = pytest.MonkeyPatch()
    patch.setattr(body, "PARSED_IN_C", 0)
    yield body.read_json
    patch.undo()


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(
    value=st.dictionaries(st.text(), JSON, max_size=3),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]),
)
def test_large_bodies_have_the_same_values(read_in_python, value, ascii_only, indent):
    assert read_in_python(json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()) == value


BAD_LARGE_BODIES = {
    "deep": (b'{"a": ' + b"[" * 100_000, "recursion"),
    "half a character": (b'{"a": ["\\ud800"]}', "surrogates not allowed"),
    "half a character as a name": (b'{"\\ud800": 1}', "surrogates not allowed"),
    "not UTF-8": (b'{"a": "\xff"}', "invalid start byte"),
    "long number": (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
    "NaN": (b'{"a": NaN}', "NaN is not JSON"),
    "unfinished": (b'{"a": [1', "delimiter"),
    "many lists": (b'{"a": [' + b"[]," * 100_000 + b"[]]}", "more than 100000 lists and objects"),
    "many objects": (b'{"a": [' + b"{}," * 100_000 + b"{}]}", "more than 100000 lists and objects"),
    "many members": (
        json.dumps({"a": {str(n): n for n in range(10_001)}}).encode(),
        "more than 10000 members in an object",
    ),
}


@pytest.mark.parametrize("case", BAD_LARGE_BODIES)
def test_bad_large_bodies(read_in_python, case):
    data, words = BAD_LARGE_BODIES[case]
    with pytest.raises(Exception, match=words) as caught:
        read_in_python(data)
    assert caught.value.status == 400


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(value=JSON, levels=st.integers(0, 6))
def test_pieces_of_json_are_that_of_the_whole(value, levels):
    assert json.loads("".join(json_pieces(value, levels))) == value
