"""Tests of tokenizers built from a GGUF file's metadata."""

import itertools
import json
import random

import pytest
from gguf_files import CONTROL, NORMAL, write_gguf
from paths import SUPPORT
from tiny import byte_tokens

from minitp.loading.gguf.splits import SPLITS
from minitp.loading.gguf.tokenizer import make_tokenizer
from minitp.loading.source import open_model
from minitp.text.tokenizer import TextStream, Tokenizer

TEXTS = [
    "",
    " ",
    "   three spaces before, two after  ",
    "\n\n\ttabs and\r\nlines\n",
    "1234567890 3.14159 ½ Ⅷ ٣",
    "naïve café, Łódź, “quotes” — … e\u0301",
    "日本語と中文 한국어 👩‍👩‍👧‍👦 🇫🇷",
    "don't we'll I'M  def f(x):\n    return x",
]

# --- byte-level BPE -------------------------------------------------------------------------------------


def byte_level(pre, merges=(), words=(), **more):
    """Build a tokenizer whose vocabulary is the bytes, the merged pairs, `words`, and two special tokens."""
    tokens = [*byte_tokens(), *("".join(pair.split()) for pair in merges), *words, "<s>", "</s>"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if t in ("<s>", "</s>") else NORMAL for t in tokens],
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": len(tokens) - 2,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        **{f"tokenizer.ggml.{name}": value for name, value in more.items()},
    }
    return make_tokenizer(metadata, "a file")


def pieces(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).tokens


@pytest.mark.parametrize("pre", SPLITS)
@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_byte_level_round_trip(pre, text):
    tokenizer = Tokenizer(byte_level(pre, ["Ġ t", "o n", "1 2"]))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["12", "34", "5", "Ġ", "12"]),
        ("smollm", ["1", "2", "3", "4", "5", "Ġ", "1", "2"]),
        ("llama-bpe", ["12", "3", "4", "5", "Ġ", "12"]),
        ("qwen2", ["1", "2", "3", "4", "5", "Ġ", "1", "2"]),
        ("tekken", ["1", "2", "3", "4", "5", "Ġ", "1", "2"]),
        ("deepseek-llm", ["1", "2", "3", "4", "5", "Ġ", "1", "2"]),
        ("smaug-bpe", ["12", "3", "4", "5", "Ġ", "12"]),
    ],
)
def test_digits_are_split_as_in_training(pre, expected):
    assert pieces(byte_level(pre, ["1 2", "3 4"]), "12345 12") == expected


def test_merges_apply_in_order():
    assert pieces(byte_level("gpt-2", ["o n", "t o"]), "ton") == ["t", "on"]
    assert pieces(byte_level("gpt-2", ["t o", "o n"]), "ton") == ["to", "n"]


def test_whole_words_of_llama_3_need_no_merges():
    for pre in ("llama-bpe", "tekken"):
        assert pieces(byte_level(pre, words=["ton"]), "ton") == ["ton"]
    assert pieces(byte_level("smaug-bpe", words=["ton"]), "ton") == ["t", "o", "n"]
    assert pieces(byte_level("gpt-2", words=["ton"]), "ton") == ["t", "o", "n"]


@pytest.mark.parametrize(
    ("pre", "more", "expected"),
    [
        ("gpt-2", {}, ["a"]),
        ("llama-bpe", {}, ["<s>", "a"]),
        ("tekken", {}, ["<s>", "a"]),
        ("deepseek-llm", {}, ["a"]),
        ("gpt-2", {"add_bos_token": True}, ["<s>", "a"]),
        ("llama-bpe", {"add_bos_token": False}, ["a"]),
        ("gpt-2", {"add_eos_token": True, "add_bos_token": True}, ["<s>", "a", "</s>"]),
    ],
)
def test_bos_and_eos(pre, more, expected):
    assert byte_level(pre, **more).encode("a").tokens == expected


def test_special_tokens_are_encoded_but_not_decoded():
    tokenizer = byte_level("gpt-2")
    assert pieces(tokenizer, "<s>a</s>") == ["<s>", "a", "</s>"]
    assert tokenizer.decode(tokenizer.encode("<s>a</s>").ids) == "a"


VECTORS = json.loads((SUPPORT / "gguf_tokenizers.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("pre", ["llama-bpe", "llama3", "tekken", "deepseek-llm"])
def test_tokens_are_those_of_the_real_tokenizers(pre):
    """Compare with published tokenizers on llama.cpp's texts; make_gguf_tokenizers.py has the sources."""
    vectors = VECTORS["llama-bpe" if pre == "llama3" else pre]
    tokens = sorted(vectors["tokens"], key=vectors["tokens"].get)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": vectors["merges"],
        "tokenizer.ggml.add_bos_token": False,
    }
    tokenizer = make_tokenizer(metadata, "a file")
    for text, expected in zip(VECTORS["texts"], vectors["ids"], strict=True):
        assert [vectors["tokens"][token] for token in pieces(tokenizer, text)] == expected, text
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


# --- SentencePiece --------------------------------------------------------------------------------------

WORDS = ["▁", *"abcdehlort!", "he", "ll", "▁h", "hell", "hello", "▁hello", "lo", "lle", "or", "▁t", "▁the"]


def sentencepiece(words, scores, **more):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + list(scores),
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[NORMAL] * len(words)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **{f"tokenizer.ggml.{name}": value for name, value in more.items()},
    }


def best_union_first(text, score_of):
    """Tokenize by SentencePiece's own rule.

    Repeatedly join the two neighbors whose union has the highest score, the leftmost of equal ones. Text that
    is not a piece in the end becomes bytes.
    """
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        unions = [a + b for a, b in itertools.pairwise(symbols)]
        known = [(-score_of[union], i) for i, union in enumerate(unions) if union in score_of]
        if not known:
            break
        _, i = min(known)
        symbols[i : i + 2] = [unions[i]]
    tokens = []
    for symbol in symbols:
        tokens += [symbol] if symbol in score_of else [f"<0x{byte:02X}>" for byte in symbol.encode()]
    return tokens


@pytest.mark.parametrize("seed", range(5))
def test_sentencepiece_joins_the_best_union_first(seed):
    rng = random.Random(seed)
    scores = rng.sample(range(-1000, 0), len(WORDS))  # all different
    tokenizer = make_tokenizer(sentencepiece(WORDS, scores), "a file")
    score_of = dict(zip(WORDS, scores, strict=True))
    for _ in range(200):
        text = "".join(rng.choices("  hheelllloorrtabé!", k=rng.randrange(1, 14)))
        assert pieces(tokenizer, text) == best_union_first(text, score_of), text


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_sentencepiece_round_trip(text):
    tokenizer = Tokenizer(make_tokenizer(sentencepiece(WORDS, range(len(WORDS))), "a file"))
    ids = tokenizer.encode(text)
    assert ids[0] == 1
    assert tokenizer.decode(ids) == text
    stream = TextStream(tokenizer, tokenizer.encode("hello"))
    streamed = "".join(map(stream.push, tokenizer.encode(" " + text)[1:])) + stream.finish()
    assert streamed.removeprefix(" ") == " " + text  # the tokenizer prepends a space


def test_sentencepiece_without_a_space_in_front():
    metadata = sentencepiece(WORDS, range(len(WORDS)), add_space_prefix=False)
    tokenizer = make_tokenizer(metadata, "a file")
    assert pieces(tokenizer, "the or") == ["t", "he", "▁", "or"]
    assert tokenizer.decode(tokenizer.encode(" the hello").ids) == " the hello"


# --- rejected files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocabulary", "expected"),
    [
        ({"pre": "jais"}, "tokenizer 'gpt2' with tokenizer.ggml.pre 'jais' is not supported"),
        ({"pre": None}, "tokenizer 'gpt2' with tokenizer.ggml.pre None is not supported"),
        ({"model": "bert"}, "tokenizer 'bert' with"),
        ({"merges": ["a b"]}, "cannot build a tokenizer from its metadata"),
        ({"model": "llama"}, "cannot build a tokenizer from its metadata"),
    ],
)
@pytest.mark.parametrize("prompt", [["hi"], ["--tokens", "1,2"]], ids=["text", "tokens"])
def test_rejected(tmp_path, refused, vocabulary, expected, prompt):
    path = write_gguf(tmp_path / "x.gguf", vocabulary=vocabulary)
    assert expected in refused("generate", *prompt, "--model", path)


def test_file_without_a_tokenizer(tmp_path, refused):
    path = write_gguf(tmp_path / "x.gguf", vocabulary={"model": "none"})
    assert open_model(str(path), 1).tokenizer() is None
    assert "has no tokenizer" in refused("generate", "hi", "--model", path)
