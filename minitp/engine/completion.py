"""The input and output of an LLM: prompts, sampling parameters and completions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import TYPE_CHECKING

from minitp.errors import InputError
from minitp.sampling import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from minitp.engine.client import Update


@dataclass
class Completion:
    """A prompt with its continuation.

    Attributes
    ----------
    prompt_token_ids : list of int
    token_ids : list of int
        The new tokens, including an end-of-text token.
    text : str
        The text of the new tokens, without special tokens and cut before a stop string; empty if the model
        has no tokenizer.
    finish_reason : str
        "stop" (end of text, or a stop string) or "length".
    logprobs : list of (float, list of (int, float))
        With SamplingParams(logprobs=N): the log-probability of each new token, and the N most probable tokens
        with theirs.
    """

    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)

    def add(self, update: Update) -> None:
        """Append new output."""
        self.token_ids += update.token_ids
        self.text += update.text
        self.logprobs += update.logprobs
        self.finish_reason = update.finish_reason


def sampling(params: SamplingParams | None, options: dict[str, object]) -> SamplingParams:
    """Return `params` (None: the defaults) with the fields in `options` replaced."""
    if params is not None and not isinstance(params, SamplingParams):
        raise InputError(f"params {params!r:.50}: expected SamplingParams")
    return replace(params or SamplingParams(), **options)


def is_tokens(prompt: Sequence[object]) -> bool:
    """Return True for one prompt of token ids, False for a list of prompts."""
    return len(prompt) > 0 and all(isinstance(token, Integral) for token in prompt)
