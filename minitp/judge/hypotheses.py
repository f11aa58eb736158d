"""The hypotheses about a wrong step: a mistake is named if it explains the recorded array up to rounding."""

import numpy as np

from minitp.check.difference import difference_of
from minitp.check.result import ratio_of
from minitp.judge.mistakes.attention import cache_mistakes, context_mistakes
from minitp.judge.mistakes.norms import norm_mistakes
from minitp.judge.mistakes.other import (
    activation_mistakes,
    embedding_mistakes,
    logits_mistakes,
    residual_mistakes,
)
from minitp.judge.mistakes.projections import PROJECTIONS, output_mistakes, projection_mistakes
from minitp.judge.mistakes.rope import fitted_rope, rope_mistakes
from minitp.judge.mistakes.roundings import rounding_mistakes
from minitp.judge.mistakes.scores import fitted_scale, probability_mistakes
from minitp.judge.mistakes.wrong_step import WrongStep

ROOM = 4  # how much a mistake's own rounding may exceed the bound of the right operation
BETTER = 2  # how many times smaller the error must be than that of the right operation
UNEXPLAINED = 0.02  # share of the elements that may differ from an array with roundings

OPERATIONS = {
    **dict.fromkeys(("norm", "q_norm", "k_norm", "post_norm", "final_norm"), norm_mistakes),
    **dict.fromkeys((*PROJECTIONS, "router", "out_partial"), projection_mistakes),
    "out": output_mistakes,
    **dict.fromkeys(("q_rope", "k_rope"), rope_mistakes),
    **dict.fromkeys(("scores", "probs"), probability_mistakes),
    **dict.fromkeys(("k_cache", "v_cache"), cache_mistakes),
    "context": context_mistakes,
    "act": activation_mistakes,
    "residual": residual_mistakes,
    "embed": embedding_mistakes,
    "logits": logits_mistakes,
}


def explain(cases, findings):
    """Return what the operation of a wrong step seems to compute instead; "" if nothing fits.

    Parameters
    ----------
    cases : list of Case
        The Case of each rank.
    findings : dict of int to Finding
        The wrong finding of a rank, or those of all ranks, which must have one explanation.
    """
    if any(finding.local is None for finding in findings.values()):
        return ""
    for known in (mistakes, rounding_mistakes, fitted):  # numbers read from the array are the last resort
        first, *others = (fitting(known, cases, rank, finding) for rank, finding in findings.items())
        others, best, text = [dict(texts) for texts in others], ROOM, ""
        for candidate, ratio in first:
            if ratio <= best and all(candidate in texts for texts in others):
                best, text = ratio, candidate
            if best <= 1:
                break  # a better one is not needed, and it may have to read other layers
        if text:
            return text
    return ""


def fitting(known, cases, rank, finding):
    """Yield (description, ratio of its error to the bound) of what explains a wrong finding of a rank.

    `known` is a function that yields the possible mistakes of a WrongStep. A rounding may go the other way
    in some elements, because the engine did not round exactly the same number; so a few may differ.
    """
    pass_ = next(one for one in cases[rank].recording.passes if one.name == finding.pass_name)
    wrong = WrongStep(cases, rank, pass_, finding.layer, finding.step)
    array, most = cases[rank].steps.read(finding.name).astype(np.float64), finding.ratio
    except_for = int(UNEXPLAINED * array.size) if known is rounding_mistakes else 0
    if except_for:
        most = error_ratio(array, wrong.right(), finding.bounds, except_for)
    for text, value in known(wrong):
        if value is None or value.shape != array.shape:
            continue
        ratio = error_ratio(array, np.asarray(value, np.float64), finding.bounds, except_for)
        if ratio <= min(ROOM, most / BETTER):
            yield text, ratio


def error_ratio(array, value, bounds, except_for=0):
    """Return the larger of an array's two errors, each divided by its bound.

    `except_for` is the number of elements that do not count, those with the largest differences.
    """
    if except_for:
        worst = np.argpartition(np.abs(array - value).reshape(-1), -except_for)[-except_for:]
        value = value.copy()
        value.reshape(-1)[worst] = array.reshape(-1)[worst]
    found = difference_of(array, value)
    pairs = zip((found.relative, found.absolute), bounds, strict=True)
    return max(ratio_of(error, bound) for error, bound in pairs)


def mistakes(wrong):
    """Yield (description, array) for the common mistakes in a step."""
    return OPERATIONS.get(wrong.step, lambda _: ())(wrong)


def fitted(wrong):
    """Try numbers that are read from the array itself: a scale of the scores, frequencies, or any factor."""
    if wrong.step in ("scores", "probs"):
        yield from fitted_scale(wrong)
    if wrong.step in ("q_rope", "k_rope"):
        yield from fitted_rope(wrong)
    yield from scaled(wrong)


def scaled(wrong):
    """Try a factor."""
    found, expected = wrong.s(wrong.step), wrong.right()
    if expected.shape != found.shape or expected.size < 2:
        return
    finite = np.isfinite(expected) & np.isfinite(found)
    factor = np.vdot(expected[finite], found[finite]) / max(
        np.vdot(expected[finite], expected[finite]), 1e-300
    )
    yield f"the right result times {factor:.6g}", np.where(finite, factor * expected, expected)
