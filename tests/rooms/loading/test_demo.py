"""Tests of the demo model (downloaded on first use) against transformers, and of its tokenizer."""

import json

import pytest
from paths import SUPPORT

from minitp.cli.perplexity import perplexity
from minitp.comm import run_threads
from minitp.device import open_device
from minitp.generate import generate
from minitp.loading.demo import demo_directory
from minitp.loading.source import open_model
from minitp.loading.weights import Loader
from minitp.model import Model
from minitp.request import Request
from minitp.sampling import SamplingParams
from minitp.text.tokenizer import TextStream

TP = 2


@pytest.fixture(scope="module")
def source():
    return open_model("smollm2", TP)


@pytest.fixture(scope="module")
def tokenizer(source):
    return source.tokenizer()


@pytest.fixture(scope="module")
def weights(source):
    """The Weights of each rank."""
    device = open_device("float32")
    return [Loader(source.plan, rank, source.tensors, device).load() for rank in range(TP)]


def on_ranks(source, weights, function):
    """Return function(model) of each rank."""
    device = open_device("float32")
    return run_threads(
        TP, lambda comm: function(Model(source.config, source.plan, weights[comm.rank], comm, device))
    )


def test_perplexity_matches_transformers(source, tokenizer, weights):
    golden = json.loads((SUPPORT / "perplexity_golden.json").read_text())
    ids = tokenizer.encode((SUPPORT / "perplexity_text.txt").read_text(encoding="utf-8"))
    assert len(ids) == golden["tokens"]
    context = source.config.max_position_embeddings
    for value, scored in on_ranks(source, weights, lambda model: perplexity(model, ids, context)):
        assert scored == golden["scored_tokens"] == len(ids) - 1
        assert value == pytest.approx(golden["perplexity"], rel=1e-4)


def test_greedy_text_matches_transformers(source, tokenizer, weights):
    ids = tokenizer.encode("The capital of France is")
    pieces = []

    def emit(piece):
        pieces.append(piece)
        return True

    def run(model):
        params = SamplingParams(max_new_tokens=20)
        request = Request(params, source.config.eos_token_ids, ids, 8192, tokenizer, emit)
        return list(generate(model, ids, request)), request.text

    tokens, text = on_ranks(source, weights, run)[0]
    assert text.startswith(" Paris.\n\nThe answer is: 2018-01-22")
    assert text == tokenizer.decode(tokens)


def test_config(source):
    assert source.directory == demo_directory()
    assert source.config.unread == ()
    c = source.config
    assert (c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads) == (30, 9, 3)
    assert (c.hidden_size, c.intermediate_size, c.vocab_size) == (576, 1536, 49152)
    assert c.tie_word_embeddings is True
    assert (c.rope.rope_theta, c.rms_norm_eps) == (100000.0, 1e-5)


TEXTS = [
    "",
    " ",
    "   three spaces before, two after  ",
    "\n\n\ttabs and\r\nlines\n",
    "1234567890 3.14159 1e-5 2018-01-22 ½ ² Ⅷ ٣",
    "naïve café, Zoë, Łódź, “quotes” — and … dots",
    "日本語と中文 한국어",
    "👍🏽 👩‍👩‍👧‍👦 🇫🇷",
    "e\u0301 is not \u00e9",
    "\u200b\ufeff\u202e\u00a0",
    "\x00\x01\x7f",
    "def f(x):\n    return x  # a comment\n",
    "don't we'll I'M",
]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_tokenizer_round_trip(source, tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(0 <= i < source.config.vocab_size for i in ids)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_streamed_text_has_no_half_characters(tokenizer, text):
    stream = TextStream(tokenizer, tokenizer.encode("Before."))
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == text


def test_each_digit_is_a_token(tokenizer):
    assert [tokenizer.decode([i]) for i in tokenizer.encode("2018 07")] == ["2", "0", "1", "8", " ", "0", "7"]


def test_special_tokens_are_encoded_but_not_decoded(tokenizer):
    ids = tokenizer.encode("<|im_start|>user\nHi<|im_end|>")
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids) == "user\nHi"
