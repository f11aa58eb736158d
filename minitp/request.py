"""A request for one continuation: its tokens, its text, and the reason why it ended."""

from dataclasses import dataclass, field
from time import perf_counter

from minitp.errors import ContextError, InputError
from minitp.sampling import Sampler, token_logprobs
from minitp.text.stop_strings import StopStrings
from minitp.text.tokenizer import TextStream
from minitp.util.format import counted

# The longest tokens of most vocabularies, such as runs of spaces, have about this many; words have four.
CHARACTERS_PER_TOKEN = 128


@dataclass
class Request:
    """A request on rank 0: it samples tokens, turns them into text, and decides when to stop.

    Parameters
    ----------
    params : SamplingParams
    eos_token_ids : tuple of int
    prompt_ids : list of int
    max_context : int
        The maximum number of positions of the prompt and the continuation together.
    tokenizer : Tokenizer or None
        The tokenizer that turns tokens into text; None to produce tokens only.
    emit : callable
        A function that is called with each complete piece of text or, without a tokenizer, with each token id
        as a string. It returns False if the output has been closed.

    Attributes
    ----------
    token_ids : list of int
        The new tokens, including an end-of-text token.
    text : str
        The text of the new tokens, without special tokens and cut before a stop string.
    finish_reason : str or None
        "stop" (an end-of-text token or a stop string), "length", or "closed" (the output has been closed).
    logprobs : list of (float, list of (int, float))
        The log-probabilities of each new token, if `params` asks for them; see `sampling.token_logprobs`.
    prompt_logprobs : list of None or (float, list of (int, float))
        The same for the prompt's tokens, if `params` asks for them; None for the first one.
    num_cached_tokens : int or None
        The number of prompt tokens whose keys and values were in the engine's cache; None until the request
        has started.
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
    prompt_logprobs: list = field(default_factory=list)
    num_cached_tokens: int | None = None

    def __post_init__(self):
        self.sampler = Sampler(self.params, self.prompt_ids)
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs.append(None)  # no logits precede the first token
        self.times = [perf_counter()]  # times of the start and of each token
        self._stream = TextStream(self.tokenizer, self.prompt_ids) if self.tokenizer else None
        self._stops = StopStrings(self.params.stop)

    def sample(self, logits):
        """Sample the next token from logits [V]; return (token, whether it is the last one)."""
        token, logprobs = self.sampler.choose(logits), None
        if self.params.logprobs is not None:
            logprobs = token_logprobs(logits, token, self.params.logprobs)
        return token, self.append_token(token, logprobs)

    def positions_to_score(self, start, stop):
        """Return the range of the positions from `start` to `stop` whose logits `score_prompt` still needs.

        The logits of a position score the token after it.
        """
        if self.params.prompt_logprobs is None:
            return range(0)
        return range(max(start, len(self.prompt_logprobs) - 1), min(stop, len(self.prompt_ids) - 1))

    @property
    def needs_host(self):
        """True while the host needs logits for more than the next token, or chooses the tokens itself."""
        scored = self.params.prompt_logprobs is None or len(self.prompt_logprobs) == len(self.prompt_ids)
        return self.params.needs_host or not scored

    def score_prompt(self, logits):
        """Append the log-probability of the next token of the prompt, from the logits [V] before it."""
        token = self.prompt_ids[len(self.prompt_logprobs)]
        self.prompt_logprobs.append(token_logprobs(logits, token, self.params.prompt_logprobs))

    def append_token(self, token, logprobs=None):
        """Append the next token and write its text; return whether it is the last one.

        `logprobs` are its log-probabilities, if `params` asks for them.
        """
        self.token_ids.append(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
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
            self._emit(f"{token} ")
            return
        piece = self._stops.push(self._stream.push(token))
        if self.finish_reason is not None:
            piece += self._stops.push(self._stream.finish()) + self._stops.finish()
        if self._stops.found:
            self.finish_reason = "stop"
        self.text += piece
        if piece:
            self._emit(piece)

    def _emit(self, piece):
        if not self.emit(piece):
            self.finish_reason = "closed"

    @property
    def positions(self):
        """The maximum number of positions of the prompt and the continuation together."""
        return min(self.max_context, len(self.prompt_ids) + self.params.max_new_tokens)

    @property
    def ttft_s(self):
        """The time from the start to the first token, in seconds."""
        return self.times[1] - self.times[0]

    @property
    def decode_tokens_per_s(self):
        """The rate of the tokens after the first one, per second; None if there is only one token."""
        decoded = len(self.token_ids) - 1
        return decoded / (self.times[-1] - self.times[1]) if decoded else None


def context_length(config, max_context):
    """Return the maximum length of a sequence: --max-context if it is given, otherwise the model's limit."""
    limit = config.max_position_embeddings
    if max_context is not None and not 1 <= max_context <= limit:
        raise InputError(
            f"--max-context {max_context}: this model's context is {counted(limit, 'token')}; "
            f"give 1 to {limit}"
        )
    return max_context or limit


def check_length(text, context):
    """Reject a text that is far too long for the context, before it is tokenized, which takes a while."""
    if len(text) > CHARACTERS_PER_TOKEN * context:
        raise ContextError(
            f"the prompt has {counted(len(text), 'character')}, which is too long for a context of "
            f"{counted(context, 'token')} "
            f"(at most {CHARACTERS_PER_TOKEN} characters per token); shorten the prompt"
        )


def check_request(prompt_ids, params, config, context):
    """Reject a prompt or SamplingParams that are invalid for the model or the context."""
    check_prompt(prompt_ids, config, context, min(1, params.max_new_tokens))
    check_logit_bias(params, config)


def check_logit_bias(params, config, name="logit_bias"):
    """Reject a bias on a token that the model does not have; `name` is the parameter's name in errors."""
    try:
        check_vocabulary(params.logit_bias or (), config)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def check_prompt(token_ids, config, context, room=1):
    """Reject a prompt that is empty, has an unknown token id, or leaves less than `room` of the context."""
    if not token_ids:
        raise InputError("the prompt is empty and this model adds no BOS token; give at least one word")
    check_vocabulary(token_ids, config)
    if len(token_ids) + room > context:
        raise ContextError(
            f"the prompt has {counted(len(token_ids), 'token')}, which leaves no room for a new one in a "
            f"context of {context}; shorten the prompt",
            len(token_ids),
        )


def check_vocabulary(token_ids, config):
    """Reject token ids that have no embedding; a tokenizer may have more tokens than the model."""
    if min(token_ids, default=0) >= 0 and max(token_ids, default=0) < config.vocab_size:
        return
    token = next(token for token in token_ids if not 0 <= token < config.vocab_size)
    raise InputError(f"token id {token!s:.30} is outside the vocabulary, 0 to {config.vocab_size - 1}")
