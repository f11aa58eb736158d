"""Tests of a tokenizer's settings: each has the effect that it has in Hugging Face transformers."""

import json

import pytest
from tiny import byte_tokenizer
from tokenizer_settings import CASES, EXPECTED, MESSAGES, TEXT, write_case
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models

from minitp.errors import InputError
from minitp.text.chat_template import load_chat_template
from minitp.text.tokenizer import load_tokenizer

VALUES = json.loads(EXPECTED.read_text(encoding="utf-8"))


# transformers builds the tokenizers of these classes from the vocabulary; minitp uses all of tokenizer.json.
REBUILT = {"Llama's class", "Gemma's class"}


@pytest.fixture
def directory(request, tmp_path):
    """The directory of the case that the parameter `name` names."""
    write_case(tmp_path / "model", request.getfixturevalue("name"))
    return tmp_path / "model"


@pytest.mark.parametrize("name", sorted(CASES.keys() - REBUILT))
def test_token_ids(directory, name):
    expected, tokenizer = VALUES[name], load_tokenizer(directory)
    assert tokenizer.encode(TEXT) == expected["ids"]
    assert tokenizer.encode(TEXT, add_special_tokens=False) == expected["without special tokens"]
    assert tokenizer.decode(expected["ids"]) == expected["decoded"]


@pytest.mark.parametrize("name", CASES)
def test_end_of_sequence_and_chat_prompt(directory, name):
    expected, variables = VALUES[name], CASES[name]["variables"]
    assert load_tokenizer(directory).eos_token_id == expected["eos_token_id"]
    assert load_chat_template(directory, "a model").render(MESSAGES, variables) == expected["prompt"]


def test_dropout_is_off(tmp_path):
    """Check that a tokenizer whose merges are dropped at random in training gives the same ids each time."""
    merges = models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], dropout=0.5)
    RawTokenizer(merges).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert {tuple(tokenizer.encode("abab")) for _ in range(20)} == {(2, 2)}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("special_tokens_map.json", "[]"),
        ("added_tokens.json", "{"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"one": {"content": "<s>"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": "<s>"}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}'),
        ("tokenizer_config.json", r'{"eos_token": "\ud800"}'),
        ("added_tokens.json", '{"<s>": [256]}'),
    ],
)
def test_malformed_settings(tmp_path, file, content):
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=file) as caught:
        load_tokenizer(tmp_path)
    assert len(str(caught.value)) < 300
