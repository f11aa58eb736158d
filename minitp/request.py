"""One continuation as it is asked for: its tokens, its text, and why it ended."""

from dataclasses import dataclass, field
from time import perf_counter

from minitp.errors import ContextError, InputError
from minitp.sampling import Sampler, token_logprobs
from minitp.text.stop_strings import StopStrings
from minitp.text.tokenizer import TextStream
from minitp.util.format import counted


@dataclass
class Request:
    """One continuation as rank 0 sees it: samples, turns tokens into text, knows when to stop.

    Parameters
    ----------
    params : SamplingParams
    eos_token_ids : tuple of int
    prompt_ids : list of int
    max_context : int
        Positions that prompt and continuation may take together.
    tokenizer : Tokenizer or None
        None: there is no text, only tokens.
    emit : callable
        Gets each piece of text (of tokens, if there is no tokenizer) as it is complete. Returns False when
        nobody reads any more.

    Attributes
    ----------
    token_ids : list of int
        The new tokens, an end-of-text token included.
    text : str
        Their text, without special tokens and cut before a stop string.
    finish_reason : str or None
        "stop" (end of text, or a stop string), "length", or "closed": nobody reads any more.
    logprobs : list of (float, list of (int, float))
        If the params want them, of each new token; see `sampling.token_logprobs`.
    """

    params: object
    eos_token_ids: tuple
    prompt_ids: list
    max_context: int
    tokenizer: object = None
    emit: object = lambda piece: True
    token_ids: list = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    logprobs: list = field(default_factory=list)

    def __post_init__(self):
        self.sampler = Sampler(self.params)
        self.times = [perf_counter()]  # of the start, then of each token
        self._stream = TextStream(self.tokenizer, self.prompt_ids) if self.tokenizer else None
        self._stops = StopStrings(self.params.stop)

    def sample(self, logits):
        """The next token from logits [V], and whether it is the last."""
        token = self.sampler.choose(logits)
        if self.params.logprobs is not None:
            self.logprobs.append(token_logprobs(logits, token, self.params.logprobs))
        return token, self.append_token(token)

    def append_token(self, token):
        """Take this as the next token; returns whether it is the last."""
        self.token_ids.append(token)
        self.times.append(perf_counter())
        length = len(self.prompt_ids) + len(self.token_ids)
        if token in self.eos_token_ids and not self.params.ignore_eos:
            self.finish_reason = "stop"
        elif len(self.token_ids) == self.params.max_new_tokens or length >= self.max_context:
            self.finish_reason = "length"
        self._write(token)
        return self.finish_reason is not None

    def _write(self, token):
        if self._stream is None:
            self._hand_out(f"{token} ")
            return
        piece = self._stops.push(self._stream.push(token))
        if self.finish_reason is not None:
            piece += self._stops.push(self._stream.finish()) + self._stops.finish()
        if self._stops.found:
            self.finish_reason = "stop"
        self.text += piece
        if piece:
            self._hand_out(piece)

    def _hand_out(self, piece):
        if not self.emit(piece):
            self.finish_reason = "closed"

    @property
    def positions(self):
        """How long prompt and continuation may become."""
        return min(self.max_context, len(self.prompt_ids) + self.params.max_new_tokens)

    @property
    def ttft_s(self):
        """Seconds from the start to the first token."""
        return self.times[1] - self.times[0]

    @property
    def decode_tokens_per_s(self):
        """Tokens a second after the first one; None if there is just one."""
        steps = len(self.token_ids) - 1
        return steps / (self.times[-1] - self.times[1]) if steps else None


def context_length(config, max_context):
    """The positions that a sequence may take: the model's own, or fewer with --max-context."""
    limit = config.max_position_embeddings
    if max_context is not None and not 1 <= max_context <= limit:
        raise InputError(
            f"--max-context {max_context}: this model's context is {limit} tokens; give 1 to that"
        )
    return max_context or limit


def check_prompt(token_ids, config, context):
    """Refuse a prompt that the model cannot take, `context` being its context length."""
    if not token_ids:
        raise InputError("the prompt is empty and this model adds no BOS token; give at least one word")
    check_vocabulary(token_ids, config)
    if len(token_ids) >= context:
        raise ContextError(
            f"the prompt has {counted(len(token_ids), 'token')} and the context {context}: "
            "no room for a new one"
        )


def check_vocabulary(token_ids, config):
    """Refuse ids that the embedding has no row for; a tokenizer may know more than the model."""
    for token in token_ids:
        if not 0 <= token < config.vocab_size:
            raise InputError(f"token id {token} is outside the vocabulary, 0 to {config.vocab_size - 1}")
