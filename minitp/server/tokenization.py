"""Tokenization over HTTP, with the fields of vLLM: /tokenize, /detokenize and /tokenizer_info."""

from contextlib import suppress
from dataclasses import dataclass

from minitp.errors import InputError
from minitp.request import check_length, check_vocabulary
from minitp.server.errors import ApiError
from minitp.server.fields import COMMON, FLAG, MESSAGES, UNSUPPORTED, Field, check_fields, is_int, is_text
from minitp.server.prompts import errors_of, render
from minitp.server.requests import conversation
from minitp.text.tokenizer_config import STANDARD, special_tokens

TOKENIZE = MESSAGES | {
    "model": COMMON["model"],
    "prompt": Field("a string", is_text),
    "add_special_tokens": FLAG,
    "return_token_strs": FLAG,
}
DETOKENIZE = {
    "model": COMMON["model"],
    "tokens": Field(
        "a list of token ids", lambda value: isinstance(value, list) and all(is_int(one) for one in value)
    ),
}


@dataclass
class TokenizeRequest:
    """A request of /tokenize: a text, or else a chat.

    Attributes
    ----------
    model : str or None
    prompt : str or None
    chat : dict
        The fields of the chat as `conversation` returns them.
    add_special_tokens, token_strs : bool
        Add special tokens to the text, and respond with the tokens of the vocabulary, too.
    """

    model: str | None
    prompt: str | None
    chat: dict
    add_special_tokens: bool
    token_strs: bool
"""
"""
