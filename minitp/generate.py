"""Generation: prefill the prompt, then one token a step, all ranks together.

Rank 0 alone looks at the logits and decides; the others learn the token from its broadcast, so the ranks
never disagree about what comes next.
"""

from dataclasses import dataclass, field
from time import perf_counter

from minitp.errors import ContextError, InputError, RankError
from minitp.model import host_logits, prefill
from minitp.sampling import Sampler, token_logprobs
from minitp.table import counted
from minitp.tokenizer import TextStream


def generate(model, prompt_ids, request, use_cache=True):
    """Yield the new tokens, on every rank. All ranks must go on, or close the generator, at the same place.

    Parameters
    ----------
    model : Model
    prompt_ids : list of int
    request : Request
        Decides on rank 0; the other ranks may pass None.
    use_cache : bool
        False computes the whole sequence anew for each token, the O(n^2) way, to the same tokens.

    Raises
    ------
    InputError
        on every rank, if the prompt is empty, fills the context, or has an id outside the vocabulary.
    """
    comm = model.comm
    ids = list(prompt_ids)
    check_prompt(ids, model.config, model.config.max_position_embeddings)
    with model.sequence_cache(comm.broadcast(request.positions if comm.rank == 0 else None)) as cache:
        logits = prefill(model, cache, ids)  # [V]
        if model.fused and use_cache and comm.broadcast(request.params.logprobs is None if request else None):
            yield from generate_ahead(model, cache, logits, request)
            return
        while True:
            token, last = comm.broadcast(request.take(logits) if comm.rank == 0 else None)
            yield token
            if last:
                return
            ids.append(token)
            if use_cache:
                logits = model.forward([token], cache, logits_at=slice(-1, None))  # [1, V]
                logits = host_logits(model, logits)[0]  # [V]
            else:
                logits = prefill(model, model.new_cache(len(ids)), ids)  # [V]


def generate_ahead(model, cache, logits, request):
    """The same on a GPU that chooses the tokens itself, and begins a step before the last one is looked at.

    So the GPU never waits for the host. Every rank's GPU chooses from the same logits, by the same draws.
    """
    comm, job = model.comm, None
    if comm.rank == 0:
        token, last = request.take(logits)
        steps = request.positions - len(request.prompt_ids) - 1
        job = token, last, request.params, request.sampler.draws(0 if last else steps)
    token, last, params, draws = comm.broadcast(job)
    yield token
    if last:
        return
    for chosen in model.decode_ahead(cache, token, params, draws):
        token, last = comm.broadcast((chosen, request.accept(chosen)) if comm.rank == 0 else None)
        if token != chosen:
            raise RankError(f"rank {comm.rank} chose token {chosen} and rank 0 {token}: their GPUs disagree")
        yield token
        if last:
            return


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

    def take(self, logits):
        """The next token from logits [V], and whether it is the last."""
        token = self.sampler.choose(logits)
        if self.params.logprobs is not None:
            self.logprobs.append(token_logprobs(logits, token, self.params.logprobs))
        return token, self.accept(token)

    def accept(self, token):
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


class StopStrings:
    """Passes text on up to the first stop string, holding back what may be the beginning of one."""

    def __init__(self, stops):
        self._stops = stops
        self._held = ""
        self.found = False

    def push(self, text):
        """The part of the text so far that is now certain to come before any stop string."""
        if self.found:
            return ""
        self._held += text
        found = [(self._held.find(stop), stop) for stop in self._stops]
        ends = [(start + len(stop), start) for start, stop in found if start >= 0]
        if ends:  # the first to be complete, whatever pieces the text comes in
            self.found = True
            _, cut = min(ends)
        else:
            cut = len(self._held) - self._longest_beginning()
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain

    def finish(self):
        """What was held back, once no more text comes."""
        rest, self._held = ("" if self.found else self._held), ""
        return rest

    def _longest_beginning(self):
        for n in range(max(map(len, self._stops), default=1) - 1, 0, -1):
            if any(len(stop) > n and self._held.endswith(stop[:n]) for stop in self._stops):
                return n
        return 0


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
