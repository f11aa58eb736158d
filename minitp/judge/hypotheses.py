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
    **dict.fromkeys((*PROJECTIONS, "out_partial"), projection_mistakes),
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
    first, *others = (fitting(cases, rank, finding) for rank, finding in findings.items())
    others = [set(texts) for texts in others]
    return next((text for text in first if all(text in texts for texts in others)), "")


def fitting(cases, rank, finding):
    """Yield the descriptions of the mistakes that explain a wrong finding of a rank."""
    array = cases[rank].recorded(finding.pass_name, finding.layer, finding.step).astype(np.float64)
    for text, value in mistakes(cases, rank, finding):
        if value is None or value.shape != array.shape:
            continue
        found = difference_of(array, np.asarray(value, np.float64))
        pairs = zip((found.relative, found.absolute), finding.bounds, strict=True)
        if max(ratio_of(error, bound) for error, bound in pairs) <= min(ROOM, finding.ratio / BETTER):
            yield text


def mistakes(cases, rank, finding):
    """Yield (description, array) for all mistakes that are known in a step."""
    pass_ = next(one for one in cases[rank].recording.passes if one.name == finding.pass_name)
    wrong = WrongStep(cases, rank, pass_, finding.layer, finding.step)
    kind = finding.step.rpartition(".")[2]
    yield from OPERATIONS.get(kind, lambda _: ())(wrong)
    yield from scaled(wrong)


def scaled(wrong):
    """Try a factor, the last resort."""
    found, expected = wrong.s(wrong.step), wrong.right()
    if expected.shape != found.shape or expected.size < 2:
        return
    finite = np.isfinite(expected) & np.isfinite(found)
    factor = np.vdot(expected[finite], found[finite]) / max(
        np.vdot(expected[finite], expected[finite]), 1e-300
    )
    yield f"the right result times {factor:.6g}", np.where(finite, factor * expected, expected)
