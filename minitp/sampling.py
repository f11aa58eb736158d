"""Sampling: choosing the next token from the logits of one position, on rank 0."""

import secrets
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TypedDict

import numpy as np

from minitp.errors import ParameterError
from minitp.util.suggest import suggests_fields

MAX_STOPS = 32  # stop strings of a request
MAX_STOP_LENGTH = 1024  # characters of a stop string
STOPS = f"up to {MAX_STOPS} non-empty strings of up to {MAX_STOP_LENGTH} characters"


@suggests_fields
@dataclass(frozen=True)
class SamplingParams:
    """The parameters that say how the tokens of a continuation are chosen and when it ends.

    Attributes
    ----------
    max_new_tokens : int
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
        position. They are computed before temperature, top-k and top-p are applied.

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

    def __post_init__(self):
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        self._check("max_new_tokens", Integral, lambda n: n >= 1, "at least 1")
        self._check("temperature", Real, lambda x: 0 <= x < float("inf"), "0 or a positive number")
        self._check("top_k", Integral, lambda n: n >= 0, "0 (all) or more")
        self._check("top_p", Real, lambda x: 0 < x <= 1, "above 0 and at most 1")
        self._check("seed", Integral | None, lambda n: n is None or n >= 0, "0 or more")
        self._check("stop", tuple | list, are_stops, STOPS)
        self._check("ignore_eos", bool, lambda _: True, "True or False")
        self._check("logprobs", Integral | None, lambda n: n is None or n >= 0, "None, 0 or more")

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


def are_stops(values):
    """Return whether the values are valid stop strings, and not too many or too long."""
    return len(values) <= MAX_STOPS and all(
        isinstance(value, str) and 0 < len(value) <= MAX_STOP_LENGTH for value in values
    )


class Sampler:
    """A sampler with one random generator, so that a seed determines the whole continuation.

    Attributes
    ----------
    seed : int or None
        The seed in use; None for greedy decoding.
    """

    def __init__(self, params):
        self._params = params
        self.seed = None
        if params.temperature > 0:
            self.seed = secrets.randbits(32) if params.seed is None else params.seed
            self._generator = np.random.Generator(np.random.PCG64(self.seed))

    def choose(self, logits):
        """Choose a token id from float32 logits [V]."""
        if self._params.temperature == 0:
            return int(np.argmax(logits))
        probs = token_probabilities(logits, self._params)  # [V]
        cumulative = np.cumsum(probs)  # [V]
        drawn = self.draws(1)[0] * cumulative[-1]
        return int(np.searchsorted(cumulative, drawn, side="right"))

    def draws(self, count):
        """Return uniform random numbers in [0, 1) for the next tokens, float64 [count]; zeros if greedy."""
        return np.zeros(count) if self._params.temperature == 0 else self._generator.random(count)


def token_probabilities(logits, params):
    """Apply temperature, top-k and top-p, in this order; return the probabilities, float64 [V] with sum 1."""
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
