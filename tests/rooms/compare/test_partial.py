"""Arrays that fit only in part, or not at all, do not end a comparison: the rest is compared."""

import numpy as np
import pytest
from dump_files import TRACE, command, rng, write

from minitp.compare.partial import partial_layouts

LOGITS, EMBED, TOKENS = "prefill/logits", "prefill/embed", "prefill/tokens"
ROUTER = TRACE.format(0, "mlp.router")
Q, CACHE, SCORES = (TRACE.format(0, f"attn.{step}") for step in ("q", "k_cache", "scores"))
T, V = 12, 20


def steps(seed=0):
    """Return steps of an invented model with 12 tokens: D = 16, H = 4, K = 2, d = 8, V = 20."""
    draw = rng(seed).standard_normal
    found = {EMBED: draw((T, 16)), Q: draw((4, T, 8)), CACHE: draw((2, T, 8)), LOGITS: draw((T, V))}
    found = {name: array.astype(np.float32) for name, array in found.items()}
    seen = np.tril(np.ones((T, T), bool))
    found[SCORES] = np.where(seen, draw((4, T, T)), -np.inf).astype(np.float32)
    found[ROUTER] = rng(seed + 100).standard_normal((T, 5)).astype(np.float32)
    return {TOKENS: rng(seed).integers(0, V, T), **found}


def joined(heads):
    return heads.transpose(1, 0, 2).reshape(T, -1)  # [H, T, d] -> [T, H d]


def padded(array, before=0, after=0, axes=(0,)):
    return np.pad(array, [(before, after) if i in axes else (0, 0) for i in range(array.ndim)])


A = steps()
X = A[LOGITS]
FITS = {  # description -> step, B's array, what is not compared
    "last token": (LOGITS, X[-1:], "B has 1 of A's 12 positions, taken as the last"),
    "last token, flat": (LOGITS, X[-1], "B has 1 of A's 12 positions, taken as the last"),
    "last token, with a batch axis": (LOGITS, X[None, -1:], "B has 1 of A's 12 positions, taken as the last"),
    "first token": (EMBED, A[EMBED][:1], "B has 1 of A's 12 positions, taken as the first"),
    "last tokens": (EMBED, A[EMBED][-5:], "B has 5 of A's 12 positions, taken as the last 5"),
    "padded vocabulary": (
        LOGITS,
        padded(X, after=12, axes=(1,)),
        "B has 32 vocabulary entries and A 20; B's first 20 are compared",
    ),
    "vocabulary without padding": (
        LOGITS,
        X[:, :18],
        "B has 18 of A's 20 vocabulary entries, taken as the first 18",
    ),
    "last token, padded vocabulary": (
        LOGITS,
        padded(X[-1:], after=12, axes=(1,)),
        "B has 1 of A's 12 positions, taken as the last, "
        "B has 32 vocabulary entries and A 20; B's first 20 are compared",
    ),
    "padded length": (
        EMBED,
        padded(A[EMBED], after=4),
        "B has 16 positions and A 12; B's first 12 are compared",
    ),
    "padded on the left": (
        EMBED,
        padded(A[EMBED], before=4),
        "B has 16 positions and A 12; B's last 12 are compared",
    ),
    "padded heads, tokens first": (
        Q,
        padded(A[Q].transpose(1, 0, 2).reshape(T, 32), after=4),
        "B has 16 positions and A 12; B's first 12 are compared",
    ),
    "cache with room": (
        CACHE,
        padded(A[CACHE], after=20, axes=(1,)),
        "B has 32 cached positions and A 12; B's first 12 are compared",
    ),
    "padded scores": (
        SCORES,
        padded(A[SCORES], after=4, axes=(1, 2)),
        "B has 16 positions and A 12; B's first 12 are compared, "
        "B has 16 cached positions and A 12; B's first 12 are compared",
    ),
    "padded tokens": (
        TOKENS,
        padded(A[TOKENS], after=4),
        "B has 16 positions and A 12; B's first 12 are compared",
    ),
    "batch": (EMBED, np.stack([steps(1)[EMBED], A[EMBED]]), "B has 2 sequences; number 1 is compared"),
    "batch with joined heads": (
        Q,
        np.stack([joined(x[Q]) for x in (steps(1), steps(2), A)]),
        "B has 3 sequences; number 2 is compared",
    ),
    "batch of tokens in a row": (
        ROUTER,
        np.concatenate([steps(1)[ROUTER], A[ROUTER], steps(2)[ROUTER]]),
        "B has 3 sequences; number 1 is compared",
    ),
    "batch of last tokens": (
        LOGITS,
        np.stack([steps(1)[LOGITS][-1], X[-1]]),
        "B has 2 sequences; number 1 is compared; B has 1 of A's 12 positions, taken as the last",
    ),
    "padded batch": (
        EMBED,
        padded(np.stack([A[EMBED], steps(1)[EMBED]]), after=4, axes=(1,)),
        "B has 2 sequences; number 0 is compared; B has 16 positions and A 12; B's first 12 are compared",
    ),
    "table with padded rows": (
        "weights/lm_head.weight",
        padded(X, after=4),
        "B has 16 vocabulary entries and A 12; B's first 12 are compared",
    ),
}


@pytest.mark.parametrize("case", FITS)
def test_the_common_part_is_compared(two, case):
    name, b, rest = FITS[case]
    a = A | {"weights/lm_head.weight": X}
    result = two({name: a[name]}, {name: np.ascontiguousarray(b)})
    (step,) = result.partial
    assert (step.relative, step.rest) == (0, rest)
    assert step.note.endswith(rest)
    wrong = b.astype(np.float32)
    wrong[np.isfinite(wrong)] += 1
    assert two({name: a[name]}, {name: wrong}).departing, "an array that fits in part may still be wrong"


def test_the_index_of_a_part_is_that_in_a(two):
    b = X[-1:].copy()
    b[0, 7] += 1
    step = two({LOGITS: X}, {LOGITS: b}).steps[0]
    assert (step.index, step.a_value) == ((11, 7), X[11, 7])
    b = A[EMBED][-5:].copy()
    b[2, 3] += 0.1
    assert two({EMBED: A[EMBED]}, {EMBED: b}, tolerance=0.1).steps[0].index == (9, 3)
    b = padded(A[EMBED], after=4)
    b[2, 3] += 0.1
    assert two({EMBED: A[EMBED]}, {EMBED: b}, tolerance=0.1).steps[0].index == (2, 3)


def test_the_first_batch_chooses_the_sequence(two):
    """Check that all steps use the sequence with the right tokens, even if another one is closer to A."""
    b = {
        name: np.stack([array, other])
        for (name, array), other in zip(A.items(), steps(1).values(), strict=True)
    }
    b[TOKENS] = b[TOKENS][::-1].copy()
    result = two(A, b)
    assert {step.rest.partition(";")[0] for step in result.steps} == {"B has 2 sequences"}
    assert {step.rest[-10:] for step in result.steps} == {"s compared"}
    assert "number 1" in result.steps[0].rest
    assert [step.name for step in result.departing] == [EMBED, Q, CACHE, SCORES, ROUTER, LOGITS]


NOT_FITTING = {  # B's array -> its reason
    "one rank's heads": (Q, A[Q][:2], "B has 1/2 of A's elements; is it one rank's part?"),
    "one rank's vocabulary": (LOGITS, X[:, :5], "B has 1/4 of A's elements; is it one rank's part?"),
    "repeated KV heads": (
        CACHE,
        np.repeat(A[CACHE], 2, 0),
        "B has 2 times A's elements; are the KV heads repeated?",
    ),
    "another hidden size": (
        EMBED,
        padded(A[EMBED], after=1, axes=(1,)),
        "no order of A's axes has this shape",
    ),
    "no known axes": ("x", X[-1], "B has 1/12 of A's elements; is it one rank's part?"),
}


@pytest.mark.parametrize("case", NOT_FITTING)
def test_arrays_that_do_not_fit_are_listed(two, case):
    name, b, reason = NOT_FITTING[case]
    a = A | {"x": X}
    result = two({name: a[name], "y": np.ones(3)}, {name: b, "y": np.ones(3)})
    assert [step.name for step in result.steps] == ["y"]
    (left_out,) = result.not_compared
    assert (left_out.name, left_out.reason) == (name, reason)
    assert (left_out.a_shape, left_out.b_shape) == (a[name].shape, b.shape)
    assert result.only_a == result.only_b == []


def test_heads_of_a_rank_are_not_taken_for_positions():
    """Check a shape with as many heads as positions: the axis that differs is the heads, in A's order."""
    assert partial_layouts(Q, (4, 4, 8), (2, 4, 8), ["H", "T", "d"]) == []
    assert partial_layouts(Q, (4, 4, 8), (4, 2, 8), ["H", "T", "d"]) != []


def test_the_output_counts_what_was_left_out(tmp_path, capsys):
    a = {TRACE.format(i, "attn.q"): A[Q] for i in range(3)} | {EMBED: A[EMBED], LOGITS: X}
    b = {TRACE.format(i, "attn.q"): A[Q][:2] for i in range(3)} | {EMBED: A[EMBED], LOGITS: X[-1]}
    paths = write(tmp_path / "a.npz", a), write(tmp_path / "b.npz", b)
    code, out = command(capsys, *paths)
    assert code == 0, "what could be compared agrees"
    assert (
        "not compared: 3 arrays prefill/layers.*.attn.q: [4, 12, 8] in A, [2, 12, 8] in B: "
        "B has 1/2 of A's elements; is it one rank's part?\n"
    ) in out
    assert "compared in part: prefill/logits: B has 1 of A's 12 positions, taken as the last\n" in out
    assert out.splitlines()[-1] == (
        "2 common steps within 0.0001 (for float32), 1 of them in another layout; "
        "3 not compared, 1 compared only in part"
    )
    b[EMBED] = b[EMBED] + 1
    code, out = command(capsys, paths[0], write(tmp_path / "b.npz", b))
    assert code == 1
    assert out.splitlines()[-2] == "3 not compared, 1 compared only in part, see above"
    assert out.splitlines()[-1].startswith("first differing step: prefill/embed: ")


def test_no_array_that_can_be_compared(tmp_path, refused):
    a, b = write(tmp_path / "a.npz", {Q: A[Q]}), write(tmp_path / "b.npz", {Q: A[Q][:2]})
    assert refused(a, b).endswith(
        f"have no array that can be compared: {Q}: [4, 12, 8] in A, [2, 12, 8] in B: "
        "B has 1/2 of A's elements; is it one rank's part?\n"
    )
