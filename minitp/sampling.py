"""Sampling: choosing the next token from the logits of one position, on rank 0."""

import secrets
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TypedDict

import numpy as np

from minitp.errors import ParameterError
from minitp.util.suggest import suggests_fields

GPU_LOGPROBS = 20  # most probable tokens of a position that a GPU reports; also the limit of the server's API
PENDING = -1  # a token that a GPU has chosen and the host has not read yet
MAX_STOPS = 32  # stop strings of a request
MAX_STOP_LENGTH = 1024  # characters of a stop string
MAX_ID_DIGITS = 18  # digits of a token id that is a string
BIASES = "numbers from -100 to 100 by token id"
STOPS = f"up to {MAX_STOPS} non-empty strings of up to {MAX_STOP_LENGTH} characters"


@suggests_fields
@dataclass(frozen=True)
class SamplingParams:
    """The parameters that say how the tokens of a continuation are chosen and when it ends.

    They are applied in this order: logit_bias, repetition_penalty, frequency_penalty, presence_penalty, then,
    unless decoding is greedy, temperature, top_k, top_p, min_p.

    Attributes
    ----------
    max_new_tokens : int
        The maximum number of new tokens. With 0, a request only reads its prompt, for `prompt_logprobs`.
    temperature : float
        The divisor of the logits. 0 always chooses the most probable token (greedy decoding).
    top_k : int
        Choose among the k most probable tokens only; 0 for all tokens.
    top_p : float
        Choose among the fewest most probable tokens whose probabilities add up to at least p.
        (Holtzman et al., The Curious Case of Neural Text Degeneration, 2019, section 3.1.)
    seed : int or None
        The seed of the random numbers; with the same number of ranks it gives the same text again. None
        draws a new seed.
    stop : tuple of str
        Up to 32 strings of up to 1024 characters, which end the text; it is cut before the first of them. A
        single string is also accepted.
    ignore_eos : bool
        Continue after an end-of-text token.
    logprobs : int or None
        Return the log-probability of each token, and those of the `logprobs` most probable tokens at its
        position. They are computed from the model's logits, before any other parameter is applied.
    min_p : float
        Choose only among tokens whose probability is at least min_p times that of the most probable one.
        (Nguyen et al., Turning Up the Heat: Min-p Sampling, 2024, section 3.)
    presence_penalty : float
        A number from -2 to 2 to subtract from the logit of each token that the continuation already has.
    frequency_penalty : float
        A number from -2 to 2 to subtract from a token's logit for each time that the continuation has it.
    repetition_penalty : float
        A number from 0.01 to 100 by which the positive logits of tokens that the prompt or the continuation
        already has are divided, and the negative ones multiplied. (Keskar et al., CTRL, 2019, section 4.1.)
    logit_bias : dict of int to float, or None
        Numbers from -100 to 100 to add to logits, by token id. An id may be a string of digits, as in JSON.
    prompt_logprobs : int or None
        Return the log-probabilities of the prompt's tokens as `logprobs` does for new ones. Only the engine
        computes them, for `LLM` and the server; `generate.generate` does not.

    Raises
    ------
    ParameterError
        If a value is invalid.
    """

    max_new_tokens: int = 100
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] | str = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = field(default=None, hash=False)  # a dict has no hash
    prompt_logprobs: int | None = None

    def __post_init__(self):
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        self._check("max_new_tokens", Integral, lambda n: n >= 0, "0 or more")
        self._check("temperature", Real, lambda x: 0 <= x < float("inf"), "0 or a positive number")
        self._check("top_k", Integral, lambda n: n >= 0, "0 (all) or more")
        self._check("top_p", Real, lambda x: 0 < x <= 1, "above 0 and at most 1")
        self._check("seed", Integral | None, lambda n: n is None or n >= 0, "0 or more")
        self._check("stop", tuple | list, are_stops, STOPS)
        self._check("ignore_eos", bool, lambda _: True, "True or False")
        self._check("logprobs", Integral | None, lambda n: n is None or n >= 0, "None, 0 or more")
        self._check("min_p", Real, lambda x: 0 <= x <= 1, "a number from 0 to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            self._check(name, Real, lambda x: -2 <= x <= 2, "a number from -2 to 2")
        self._check("repetition_penalty", Real, lambda x: 0.01 <= x <= 100, "a number from 0.01 to 100")
        self._check("logit_bias", dict | None, lambda bias: bias is None or are_biases(bias), BIASES)
        self._check("prompt_logprobs", Integral | None, lambda n: n is None or n >= 0, "None, 0 or more")
        if self.logit_bias is not None:
            biases = {int(token): float(bias) for token, bias in self.logit_bias.items()}
            object.__setattr__(self, "logit_bias", biases)

    @property
    def changes_logits(self):
        """True if `changed_logits` has to change logits before a token is chosen from them."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return bool(penalties or self.logit_bias)

    @property
    def needs_host(self):
        """True if the host must choose the tokens: a GPU does not report as many log-probabilities."""
        return self.logprobs is not None and self.logprobs > GPU_LOGPROBS

    def _check(self, name, types, is_valid, expected):
        value = getattr(self, name)
        is_flag = isinstance(value, bool) and types is not bool  # True is an int, but not a count
        if is_flag or not isinstance(value, types) or not is_valid(value):
            raise ParameterError(name, value, expected)


class SamplingFields(TypedDict, total=False):
    """The fields of SamplingParams as keyword arguments, for the annotations of `LLM`."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    stop: tuple[str, ...] | str
    ignore_eos: bool
    logprobs: int | None
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: dict[int, float] | None
    prompt_logprobs: int | None


def are_stops(values):
    """Return whether the values are valid stop strings, neither too many nor too long."""
    return len(values) <= MAX_STOPS and all(
        isinstance(value, str) and 0 < len(value) <= MAX_STOP_LENGTH for value in values
    )


def are_biases(biases):
    """Return whether a dict has only numbers from -100 to 100, by token id."""
    return all(is_token_id(token) and is_bias(bias) for token, bias in biases.items())


def is_token_id(value):
    """Return whether a value is a token id: a whole number that is not negative, or a string of digits."""
    if isinstance(value, str):
        return value.isascii() and value.isdecimal() and len(value) <= MAX_ID_DIGITS
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 0


def is_bias(value):
    """Return whether a value is a number from -100 to 100."""
    return isinstance(value, Real) and not isinstance(value, bool) and -100 <= value <= 100


class Sampler:
    """A sampler with one random generator, so that a seed determines the whole continuation.

    Parameters
    ----------
    params : SamplingParams
    prompt_ids : list of int
        The prompt, for `repetition_penalty`.

    Attributes
    ----------
    seed : int or None
        The seed in use; None for greedy decoding.
    """

    def __init__(self, params, prompt_ids=()):
        self._params, self._prompt_ids = params, prompt_ids
        self._counts = self._seen = None  # see changed_logits; made once V is known
        self.seed = None
        if params.temperature > 0:
            self.seed = secrets.randbits(32) if params.seed is None else params.seed
            self._generator = np.random.Generator(np.random.PCG64(self.seed))

    def choose(self, logits):
        """Choose a token id from float32 logits [V]."""
        if not self._params.changes_logits:
            return self._choose(logits)
        if self._counts is None:
            self._counts = np.zeros(len(logits), np.int32)  # [V]
            self._seen = np.zeros(len(logits), bool)  # [V]
            self._seen[list(self._prompt_ids)] = True
        token = self._choose(changed_logits(logits, self._params, self._counts, self._seen))
        self._counts[token] += 1
        self._seen[token] = True
        return token

    def _choose(self, logits):
        """Choose a token id from logits [V] as they are."""
        if self._params.temperature == 0:
            return int(np.argmax(logits))
        probs = token_probabilities(logits, self._params)  # [V]
        cumulative = np.cumsum(probs)  # [V]
        drawn = self.draw() * cumulative[-1]
        return int(np.searchsorted(cumulative, drawn, side="right"))

    def draw(self):
        """Return a uniform random number in [0, 1) for the next token; 0 if greedy."""
        return float(self.draws(1)[0])

    def draws(self, count):
        """Return uniform random numbers in [0, 1) for the next tokens, float64 [count]; zeros if greedy."""
        return np.zeros(count) if self._params.temperature == 0 else self._generator.random(count)


def changed_logits(logits, params, counts, seen):
    """Apply logit_bias and the repetition, frequency and presence penalties, in this order.

    Parameters
    ----------
    logits : float32 [V]
    params : SamplingParams
    counts : int32 [V]
        The number of times that each token is in the continuation.
    seen : bool [V]
        True for tokens of the prompt or the continuation.

    Returns
    -------
    float32 [V]
        New logits. Each operation is rounded to float32.
    """
    logits = logits.copy()  # [V]
    if params.logit_bias:
        logits[list(params.logit_bias)] += np.fromiter(params.logit_bias.values(), np.float32)  # [n]
    if params.repetition_penalty != 1:
        penalty = np.float32(params.repetition_penalty)
        repeated = logits[seen]  # [n]
        logits[seen] = np.where(repeated > 0, repeated / penalty, repeated * penalty)  # [n]
    logits -= np.float32(params.frequency_penalty) * counts.astype(np.float32)  # [V]
    logits -= np.float32(params.presence_penalty) * (counts > 0).astype(np.float32)  # [V]
    return logits


def token_probabilities(logits, params):
    """Apply temperature, top-k, top-p and min-p, in this order.

    Parameters
    ----------
    logits : float32 [V]
    params : SamplingParams

    Returns
    -------
    float64 [V]
        Probabilities, with sum 1.
    """
    below_best = logits.astype(np.float64) - logits.max()  # [V]
    with np.errstate(over="ignore"):  # with a tiny temperature all tokens but the best become -inf
        scaled = below_best / params.temperature  # [V]
    order = np.argsort(-scaled, kind="stable")  # [V], the most probable first; ties by token id
    kept = len(order) if params.top_k == 0 else min(params.top_k, len(order))
    best = scaled[order[:kept]]  # [kept]
    probs = np.exp(best)  # [kept]
    probs /= probs.sum()
    if params.top_p < 1:
        needed = int(np.searchsorted(np.cumsum(probs), params.top_p)) + 1
        probs = probs[:needed] / probs[:needed].sum()  # [needed]
    if params.min_p > 0:
        probs = probs[probs >= params.min_p * probs[0]]  # [likely], the first ones
        probs /= probs.sum()
    result = np.zeros(len(logits))  # [V]
    result[order[: len(probs)]] = probs
    return result


def token_logprobs(logits, token, top):
    """Return the log-probability of a token, and the `top` most probable tokens with theirs.

    Parameters
    ----------
    logits : float32 [V]
    token, top : int

    Returns
    -------
    float, list of (int, float)
        The list has (token id, log-probability) pairs, the most probable first, ties in order of the id.
    """
    below_best = logits.astype(np.float64) - logits.max()  # [V]
    logprobs = below_best - np.log(np.exp(below_best).sum())  # [V]
    best = most_probable(logprobs, min(top, len(logprobs))) if top else []  # [top]
    return float(logprobs[token]), [(int(t), float(logprobs[t])) for t in best]


def most_probable(logprobs, count):
    """Return the ids of the `count` most probable tokens, the best first and ties in order of the id."""
    # A partition is faster than sorting all V.
    least = np.partition(logprobs, -count)[-count]
    candidates = np.flatnonzero(logprobs >= least)  # [count], or more if there are ties
    return candidates[np.argsort(-logprobs[candidates], kind="stable")][:count]  # [count]
