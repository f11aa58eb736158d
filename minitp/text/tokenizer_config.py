"""The settings of a tokenizer that are outside tokenizer.json, merged as Hugging Face's library merges them.

They are in tokenizer_config.json and, for tokenizers saved by old versions, in special_tokens_map.json and
added_tokens.json. add_bos_token and add_eos_token have no effect: tokenizer.json says what is added.
"""

import os
from pathlib import Path

from minitp.errors import InputError
from minitp.util.files import read_json

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
    `added_tokens_decoder`: then the map is only a copy for old versions. The tokens that added_tokens.json
    lists become entries of that field. A padding token may also be in tokenizer.json.

    Raises
    ------
    InputError
        If a file is not a JSON object, or `added_tokens_decoder` does not list tokens.
    """
    directory = Path(directory)
    fields = read_object(directory / "tokenizer_config.json")
    if "added_tokens_decoder" not in fields:
        fields |= read_object(directory / "special_tokens_map.json")
        added = read_object(directory / "added_tokens.json")
        special = special_tokens(fields).values()
        fields["added_tokens_decoder"] = {
            number: {"content": text, "special": text in special} for text, number in added.items()
        }
    if "pad_token" not in fields:
        padding = read_object(directory / "tokenizer.json").get("padding") or {}
        fields |= {"pad_token": padding["pad_token"]} if "pad_token" in padding else {}
    check_added_tokens(fields["added_tokens_decoder"], directory)
    return fields


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
    """Return the text of each special token that a tokenizer has, by name, as in {"bos_token": "<s>"}.

    A field is null, a string, or an object with the field "content". Without the field, a token is that of
    the tokenizer class.
    """
    name = str(fields.get("tokenizer_class")).removesuffix("Fast")
    fields = CLASS_TOKENS.get(name, {}) | fields
    tokens = {key: token_text(value) for key, value in fields.items() if key.endswith("_token")}
    return {key: text for key, text in tokens.items() if text is not None}


def token_text(value):
    """Return the text of a special token, or None for a value that is not a token, such as null or true."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None
