"""What goes into an LLM and what comes out: prompts, how to sample, and completions."""

from dataclasses import dataclass, field, replace
from numbers import Integral

from minitp.errors import InputError
from minitp.sampling import SamplingParams


@dataclass
class Completion:
    """What a model has made of a prompt.

    Attributes
    ----------
    prompt_token_ids : list of int
    token_ids : list of int
        The new tokens, an end-of-text token included.
    text : str
        Their text, without special tokens and cut before a stop string. Empty if the model has no tokenizer.
    finish_reason : str
        "stop" (end of text, or a stop string) or "length".
    logprobs : list of (float, list of (int, float))
        With SamplingParams(logprobs=N), for each new token the logarithm of its probability, and the N most
        probable tokens with theirs.
    """

    prompt_token_ids: list
    token_ids: list = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    logprobs: list = field(default_factory=list)

    def add(self, update):
        """Put what is new behind what there is."""
        self.token_ids += update.token_ids
        self.text += update.text
        self.logprobs += update.logprobs
        self.finish_reason = update.finish_reason


def sampling(params, options):
    """SamplingParams, with fields that differ."""
    if params is not None and not isinstance(params, SamplingParams):
        raise InputError(f"params {params!r:.50}: expected SamplingParams")
    try:
        return replace(params or SamplingParams(), **options)
    except TypeError as error:
        raise InputError(f"{error}: SamplingParams has no such field") from error


def is_tokens(prompt):
    """Whether this is one prompt of token ids, not a list of prompts."""
    return len(prompt) > 0 and all(isinstance(token, Integral) for token in prompt)
