"""Suggestions for names that are mistyped or come from other tools."""

import pytest

from minitp.util.suggest import ALIASES, did_you_mean

OPTIONS = ["--max-new-tokens", "--max-context", "--temperature", "--top-p", "--tp", "--split", "--seed"]
OPTIONS += ["--kv-dtype"]
PARAMETERS = [option[2:].replace("-", "_") for option in OPTIONS]


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--temprature", "--temperature"),
        ("--temp", "--temperature"),
        ("--top_p", "--top-p"),
        ("--SEED", "--seed"),
        ("--max-tokens", "--max-new-tokens"),
        ("--tensor-parallel-size", "--tp"),
        ("--tensor-split", "--split"),
        ("--max-model-len", "--max-context"),
        ("--ctx-size", "--max-context"),
        ("--kv-cache-dtype", "--kv-dtype"),
        ("--max", None),  # of two options
        ("--gpu-memory-utilization", None),
        ("--no-such-option", None),
        ("", None),
    ],
)
def test_the_suggestion_is_spelled_as_the_candidates_are(word, meant):
    assert did_you_mean(word, OPTIONS) == meant
    name = word.removeprefix("--").replace("-", "_")
    assert did_you_mean(name, PARAMETERS) == (meant and meant[2:].replace("-", "_"))


def test_an_alias_counts_only_where_its_target_is_known():
    assert did_you_mean("--max-tokens", ["--tp"]) is None
    assert did_you_mean("abc", ["xyz"], {"abc": "xyz"}) == "xyz"
    assert did_you_mean("xyzz", ["xyz"], {"xyzz": None}) is None, "known not to exist"


def test_aliases_are_written_plainly():
    for name, target in ALIASES.items():
        assert not set(name + (target or "")) - set("abcdefghijklmnopqrstuvwxyz_"), name
