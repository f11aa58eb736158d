"""The input and output of an LLM: prompts, sampling parameters and completions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import TYPE_CHECKING

from minitp.errors import InputError
from minitp.sampling import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from minitp.engine.ranks import Update


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
    prompt_logprobs : list of None or (float, list of (int, float))
        With SamplingParams(prompt_logprobs=N): the same for the prompt's tokens; None for the first one.
    cached_tokens : int
        The number of prompt tokens whose keys and values were still in the KV cache.
    """

    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)
    prompt_logprobs: list[tuple[float, list[tuple[int, float]]] | None] = field(default_factory=list)
    cached_tokens: int = 0

    def add(self, update: Update) -> None:
        """Append new output."""
        self.token_ids += update.token_ids
        self.text += update.text
        self.logprobs += update.logprobs
        self.prompt_logprobs += update.prompt_logprobs
        self.cached_tokens = update.cached_tokens
        self.finish_reason = update.finish_reason


def sampling(params: SamplingParams | None, options: dict[str, object]) -> SamplingParams:
    """Return `params` (None: the defaults) with the fields in `options` replaced."""
    if params is not None and not isinstance(params, SamplingParams):
        raise InputError(f"params {params!r:.50}: expected SamplingParams")
    return replace(params or SamplingParams(), **options)


def is_tokens(prompt: Sequence[object]) -> bool:
    """Return True for one prompt of token ids, False for a list of prompts."""
    return len(prompt) > 0 and all(isinstance(token, Integral) for token in prompt)
