"""Tests of the comparison of replicas in `check`, which names the first step whose bits differ."""

from types import SimpleNamespace

import numpy as np
import pytest

from minitp.check.replicas import replica_difference, replicas_verdict
from minitp.check.step_file import StepFile
from minitp.comm import run_threads


def recorded(changes=()):
    """Return a StepFile of three steps, in which the bits of the steps `changes` differ."""
    steps = StepFile()
    for name in ("prefill/embed", "prefill/layers.0.attn.q", "prefill/logits"):
        value = 1 + np.finfo(np.float32).eps * (name in changes)
        steps.write(name, np.full((2, 3), value, np.float32))
    return steps


def compared(changes, size=2):
    """Return what each of four ranks finds in groups of `size`; `changes` has the changed steps of some."""

    def rank(everyone):
        group = SimpleNamespace(size=size, all_groups=everyone)
        return replica_difference(group, recorded(changes.get(everyone.rank, ())))

    return run_threads(4, rank)


def test_equal_bits():
    assert compared({}) == [None] * 4
    of_rank_1 = ("prefill/embed",)
    assert compared({1: of_rank_1, 3: of_rank_1}) == [None] * 4, "rank 1 of both groups"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({3: ("prefill/logits",)}, "replica 1 differs from replica 0: first step prefill/logits, rank 1"),
        ({0: ("prefill/embed",)}, "replica 1 differs from replica 0: first step prefill/embed, rank 0"),
        (
            {2: ("prefill/logits",), 3: ("prefill/layers.0.attn.q",)},
            "replica 1 differs from replica 0: first step prefill/layers.0.attn.q, rank 1",
        ),
    ],
)
def test_the_first_step_that_differs(changes, words):
    assert [str(found) for found in compared(changes)] == [words] * 4


def test_replicas_of_one_rank():
    changes = {2: ("prefill/logits",)}
    found = compared(changes, size=1)
    assert [str(each) for each in found] == [
        "replica 2 differs from replica 0: first step prefill/logits, rank 0"
    ] * 4


@pytest.mark.parametrize(
    ("wrong", "difference", "expected"),
    [
        ((), None, ("fine 0; 2 replicas with the same bits", True)),
        ((), "replica 1 differs", ("fine 0, but replica 1 differs", False)),
        ((2, 3), None, ("replica 1: wrong 2", False)),
        ((0, 1, 2, 3), None, ("replica 0: wrong 0\nreplica 1: wrong 2", False)),
    ],
)
def test_verdict(wrong, difference, expected):
    def rank(everyone):
        ok = everyone.rank not in wrong
        result = SimpleNamespace(ok=ok, replica_difference=difference)
        said = f"{'fine' if ok else 'wrong'} {everyone.rank}"
        return replicas_verdict(SimpleNamespace(size=2, all_groups=everyone), result, said)

    assert run_threads(4, rank)[0] == expected
