"""The hypotheses about a wrong step: a mistake is named if it explains the recorded array up to rounding."""

import numpy as np

from minitp.check.difference import difference_of
from minitp.check.result import ratio_of
from minitp.judge.attention_mistakes import (
    cache_mistakes,
    context_mistakes,
    probability_mistakes,
    rope_mistakes,
)
from minitp.judge.other_mistakes import (
    PROJECTIONS,
    activation_mistakes,
    embedding_mistakes,
    logits_mistakes,
    norm_mistakes,
    output_mistakes,
    projection_mistakes,
    residual_mistakes,
)
from minitp.judge.wrong_step import WrongStep

ROOM = 4  # how much a mistake's own rounding may exceed the bound of the right operation
BETTER = 2  # how many times smaller the error must be than that of the right operation

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
    for known in (mistakes, scaled):  # a factor is the last resort
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

    `known` is a function that yields the possible mistakes of a WrongStep.
    """
    pass_ = next(one for one in cases[rank].recording.passes if one.name == finding.pass_name)
    array = cases[rank].steps.read(finding.name).astype(np.float64)
    for text, value in known(WrongStep(cases, rank, pass_, finding.layer, finding.step)):
        if value is None or value.shape != array.shape:
            continue
        found = difference_of(array, np.asarray(value, np.float64))
        pairs = zip((found.relative, found.absolute), finding.bounds, strict=True)
        ratio = max(ratio_of(error, bound) for error, bound in pairs)
        if ratio <= min(ROOM, finding.ratio / BETTER):
            yield text, ratio


def mistakes(wrong):
    """Yield (description, array) for the common mistakes in a step."""
    return OPERATIONS.get(wrong.step, lambda _: ())(wrong)


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
