"""Tests of the errors that a user sees, as values."""

import pickle
import re

import pytest

from minitp.errors import LONGEST, AgreedError, InputError, ParameterError, RankError
from minitp.text.chat_template import RejectedMessagesError

ERRORS = [
    InputError("a message"),
    ParameterError("top_k", -1, "0 or more"),
    RejectedMessagesError("no system role"),
    RankError("rank 1 died", ["its last", "words"]),
    AgreedError("no memory", 3),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_can_be_pickled(error):
    """A process pool pickles the exceptions of its workers; one that cannot be read breaks the pool."""
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
    assert copy.exit_code == error.exit_code


def test_refusal_cannot_control_a_terminal():
    message = str(InputError("tensor \x1b[2J\x00é 日本\u202e\udcff\nis unknown"))
    assert message == r"tensor \x1b[2J\x00é 日本\u202e\udcff is unknown"


def test_long_paths_are_shortened_before_words():
    a, b = (f"/data/{'folder/' * 30}{name}.npz" for name in "ab")
    message = str(InputError(f"{a} and {b} have no array that can be compared; {'give other files ' * 4}"))
    assert len(message) <= LONGEST
    assert re.fullmatch(
        r"/data/folder/\S+\.\.\S+/a\.npz and /data/folder/\S+\.\.\S+/b\.npz have no array that can be "
        r"compared; (give other files ?){4} ?",
        message,
    )
