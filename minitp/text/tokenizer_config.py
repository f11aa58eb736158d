"""The settings of a tokenizer that are outside tokenizer.json, merged as Hugging Face's library merges them.

They are in tokenizer_config.json and, for tokenizers saved by old versions, in special_tokens_map.json and
added_tokens.json. add_bos_token and add_eos_token have no effect: tokenizer.json says what is added.
"""

import os
from pathlib import Path

from minitp.errors import InputError
from minitp.util.files import read_json

# The names of special tokens that any tokenizer may have, in the order in which new ones get their ids.
STANDARD = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
# Special tokens that a tokenizer class has by default, by its name without "Fast".
CLASS_TOKENS = {
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "GemmaTokenizer": {
        "unk_token": "<unk>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
    "Qwen2Tokenizer": dict.fromkeys(["unk_token", "eos_token", "pad_token"], "<|endoftext|>"),
    "GPT2Tokenizer": dict.fromkeys(["unk_token", "bos_token", "eos_token"], "<|endoftext|>"),
}


def read_tokenizer_config(directory):
    """Return the merged settings of a model's directory as a dict; a missing file has no settings.

    special_tokens_map.json overrides tokenizer_config.json, except where the latter has the field
    `added_tokens_decoder`: then the map is only a copy for old versions. Otherwise this field gets the tokens
    that added_tokens.json and tokenizer.json list. Tokens without a field are those of the tokenizer class; a
    padding token may also be in tokenizer.json.

    Raises
    ------
    InputError
        If a file is not a JSON object, or `added_tokens_decoder` does not list tokens.
    """
    directory = Path(directory)
    fields = read_object(directory / "tokenizer_config.json")
    listed = "added_tokens_decoder" in fields
    if not listed:
        fields |= read_object(directory / "special_tokens_map.json")
    fields = class_tokens(fields, directory) | fields
    raw = {} if listed and "pad_token" in fields else read_object(directory / "tokenizer.json")
    if "pad_token" not in fields:
        padding = raw.get("padding")
        fields |= {"pad_token": padding.get("pad_token")} if isinstance(padding, dict) else {}
    if not listed:
        special = [token_text(one) for one in (*named_tokens(fields).values(), *unnamed_tokens(fields))]
        added = read_object(directory / "added_tokens.json")
        legacy = {
            str(number): {"content": text, "special": text in special} for text, number in added.items()
        }
        tokens = [one for one in raw.get("added_tokens") or [] if isinstance(one, dict)]
        fields["added_tokens_decoder"] = legacy | {str(token.get("id")): token for token in tokens}
    check_added_tokens(fields["added_tokens_decoder"], directory)
    return fields


def class_tokens(fields, directory):
    """Return the default special tokens of a tokenizer class; Llama's has none for byte-level BPE."""
    name = str(fields.get("tokenizer_class")).removesuffix("Fast")
    tokens = CLASS_TOKENS.get(name, {})
    if name == "LlamaTokenizer" and tokens.keys() - fields:
        raw = read_object(directory / "tokenizer.json")
        if "ByteLevel" in str([raw.get("pre_tokenizer"), raw.get("decoder")]):
            return {}
    return tokens


def read_object(path):
    """Return the object in a JSON file, or {} if there is no such file."""
    return read_json(path) if os.path.lexists(path) else {}


def check_added_tokens(added, directory):
    """Raise InputError unless the field `added_tokens_decoder` is an object of tokens by id."""
    if not isinstance(added, dict) or not all(
        str(number).isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str)
        for number, token in added.items()
    ):
        raise InputError(
            f"{directory}: the added tokens in tokenizer_config.json or added_tokens.json are {added!r:.60}, "
            'expected ids and tokens, as in {"0": {"content": "<s>"}}'
        )


def special_tokens(fields):
    """Return the text of each named special token of a tokenizer, as in {"bos_token": "<s>"}."""
    return {name: token_text(value) for name, value in named_tokens(fields).items()}


def named_tokens(fields):
    """Return the value of each named special token: a string, or an object with the field "content".

    Names end in "_token", or are in the object `extra_special_tokens`. A field that is null has no token.
    """
    extra = fields.get("extra_special_tokens")
    tokens = dict.fromkeys(STANDARD) | {key: value for key, value in fields.items() if key.endswith("_token")}
    tokens |= extra if isinstance(extra, dict) else {}
    return {key: value for key, value in tokens.items() if token_text(value) is not None}


def unnamed_tokens(fields):
    """Return the values of special tokens without a name: the list `extra_special_tokens`.

    Old versions of transformers call this list `additional_special_tokens`.
    """
    tokens = fields.get("extra_special_tokens") or fields.get("additional_special_tokens")
    return [one for one in tokens if token_text(one) is not None] if isinstance(tokens, list) else []


def token_text(value):
    """Return the text of a special token, or None for a value that is not a token, such as null or true."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None
