"""Options of LLM and of the commands: all are checked and reach the ranks."""

import json
from argparse import Namespace
from dataclasses import asdict, fields

import numpy as np
import pytest

from minitp.cli.arguments import parser
from minitp.cli.options import llm_options
from minitp.engine.client import StartedRanks
from minitp.engine.options import EngineOptions
from minitp.errors import InputError
from minitp.launch.supervisor import RankProcesses

OTHER = EngineOptions(
    model="somewhere",
    tp="3",
    split="2,1,1",
    revision="main",
    replicas=2,
    layers=1,
    device="cpu",
    dtype="float16",
    kv_dtype="int8",
    comm="mpi",
    share_gpu=True,
    max_context=20,
    cache_tokens=64,
    block_size=8,
    max_tokens_per_step=7,
    max_sequences=5,
    verbose=True,
)


def test_other_changes_the_default_of_every_field():
    assert [field.name for field in fields(OTHER) if getattr(OTHER, field.name) == field.default] == []


def test_ranks_are_started_with_all_options(monkeypatch):
    """Parse the options again as `minitp ranks JSON` does."""
    started = []

    def start(job, command):
        started.append(command)
        raise InputError("no ranks are started in this test")

    monkeypatch.setattr(RankProcesses, "start", start)
    with pytest.raises(InputError):
        StartedRanks(OTHER, 3)
    args = parser().parse_args(started[0][-2:])
    assert EngineOptions(**json.loads(args.options)) == OTHER


def test_a_command_passes_on_all_its_options():
    args = Namespace(**asdict(OTHER), something_else=1)
    assert llm_options(args, "3") == asdict(OTHER)
    serve = parser().parse_args(["serve", "--kv-dtype", "int8", "--layers", "1", "--cache-tokens", "64"])
    given = {name: value for name, value in llm_options(serve, "3").items() if value is not None}
    wanted = {"tp": "3", "kv_dtype": "int8", "layers": 1, "cache_tokens": 64}
    assert EngineOptions(**given) == EngineOptions(**wanted)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"layers": np.int64(1)}, 1),
        ({"max_context": np.int32(20)}, 20),
        ({"cache_tokens": "64"}, 64),
        ({"dtype": np.dtype("float32")}, "float32"),
        ({"verbose": np.bool_(True)}, True),
        ({"share_gpu": np.bool_(False)}, False),
    ],
)
def test_numpy_values_and_numbers_as_text_are_converted(given, kept):
    (name,) = given
    options = EngineOptions(**given)
    assert type(getattr(options, name)) is type(kept)
    assert getattr(options, name) == kept
    assert EngineOptions(**json.loads(json.dumps(asdict(options)))) == options


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"layers": True}, "--layers True: expected a whole number"),
        ({"max_context": 1.5}, "--max-context 1.5: expected a whole number"),
        ({"block_size": None}, "--block-size None: expected a whole number"),
        ({"cache_tokens": "much"}, "--cache-tokens 'much': expected a whole number"),
        ({"share_gpu": "no"}, "--share-gpu 'no': expected True or False"),
        ({"verbose": 1}, "--verbose 1: expected True or False"),
        (
            {"dtype": np.float16(1)},
            "--dtype np.float16(1.0): expected one of auto, float32, float16, bfloat16",
        ),
        ({"split": 3}, "--split 3: expected a share for each rank, as in 3,1 or (0.6, 0.4)"),
        ({"comm": "pigeons"}, "--comm 'pigeons': expected one of auto, nccl, peer, mpi, shm"),
    ],
)
def test_wrong_values_are_rejected(given, words):
    with pytest.raises(InputError) as caught:
        EngineOptions(**given)
    assert str(caught.value) == words
