"""Tests that a refusal is one short line, whatever is in config.json and on the command line."""

import math

import pytest
from written_configs import NEWEST

from minitp.cli.arguments import parser
from minitp.errors import LONGEST, InputError
from minitp.loading.config import parse_config
from minitp.loading.config_fields import ONLY_VALUE
from minitp.loading.quantized import FIELDS
from minitp.loading.rope_config import LISTS, ROPE_TYPES

HUGE = {
    "text": "a text\n" * 2000,
    "number": 10**400,
    "negative number": -(10**400),
    "infinity": math.inf,
    "list": ["model.layers.0.mlp.gate"] * 500,
    "object": {f"model.layers.{i}.mlp.gate": i for i in range(500)},
}
NEEDED = {name: None for needed, _ in ROPE_TYPES.values() for name in needed}  # in order
WAYS_OUT = (", expected ", "; supported: ", "; use ")


def refusals(family, fields):
    """Yield (field, message) for each of these fields and each value in HUGE that is refused there.

    A field `rope_scaling.x` is the field x of a type of RoPE that has it.
    """
    written = NEWEST[family]
    factors = [1.0] * (parse_config(written, "here").rotary_dim // 2)
    for name in fields:
        for value in HUGE.values():
            change, entry = {name: value}, name.rpartition(".")[2]
            if name.startswith("rope_scaling."):
                kind = next(kind for kind, names in ROPE_TYPES.items() if entry in sum(names, ()))
                scaling = {name: factors if name in LISTS else 64 + i for i, name in enumerate(NEEDED)}
                change = {"rope_scaling": {**scaling, "rope_type": kind, entry: value}}
            try:
                parse_config({**written, **change}, "here")
            except InputError as error:
                yield entry, str(error)


@pytest.mark.parametrize("family", NEWEST)
def test_huge_values_in_config_json(family):
    """Check that each message names the field and ends with the way out, which is never cut."""
    rope = {f"rope_scaling.{entry}" for names in ROPE_TYPES.values() for entry in sum(names, ())}
    more = {"rope_scaling", "rope_theta", "torch_dtype", "head_dim", "partial_rotary_factor"}
    fields = sorted({*NEWEST[family], *ONLY_VALUE, *FIELDS, *rope, *more})
    refused = list(refusals(family, fields))
    assert len(refused) > 100
    for name, message in refused:
        assert len(message) <= LONGEST
        assert message.isprintable(), "it has line breaks"
        assert message.startswith("here: ")
        assert name in message
        way_out = max(message.rpartition(way)[2] for way in WAYS_OUT if way in message)
        assert " .. " not in way_out


def command_options():
    """Return {option: (command, positional arguments)} for each option that takes a value."""
    found = {}
    for command, sub in parser().commands.items():
        needed = ["missing" for action in sub._actions if not action.option_strings]
        for action in sub._actions:
            if action.option_strings and action.nargs != 0:
                found.setdefault(action.option_strings[-1], (command, needed))
    return found


@pytest.mark.parametrize(("option", "command"), command_options().items(), ids=str)
def test_huge_values_on_the_command_line(refused, tmp_path, monkeypatch, option, command):
    """Check the first command that has the option; the model does not exist, so nothing runs."""
    monkeypatch.chdir(tmp_path)
    name, positional = command
    model = ["--model", "./missing"] if "--model" in parser().commands[name]._option_string_actions else []
    for value in ("9" * 5000, "one\ntwo" * 500):
        refused(name, *positional, *model, f"{option}={value}")
