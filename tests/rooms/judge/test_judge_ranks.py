"""The judgement of recordings on several ranks: of transformers with and without faults, and of minitp."""

import functools
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from paths import GOLDENS, SUPPORT
from safetensors import safe_open
from safetensors.numpy import save_file

from minitp.check import expected
from minitp.check.difference import difference_of
from minitp.cli.main import main
from minitp.comm import run_threads
from minitp.device import open_device
from minitp.judge.files import RecordedFiles
from minitp.judge.recording import EngineRecording
from minitp.judge.run import judge
from minitp.load import load_model
from minitp.loading.source import open_model
from minitp.trace.record import passes_of, wanted_steps
from minitp.trace.reference import open_oracle
from minitp.trace.write import write_trace

RECORDINGS = SUPPORT / "rank_recordings"
CASES = json.loads((SUPPORT / "rank_recordings.json").read_text())
RIGHT = [name for name, case in CASES.items() if case["step"] is None]
FAULTY = [name for name in CASES if name not in RIGHT]


def judged(path, golden):
    source = open_model(str(GOLDENS / golden), 1)
    return judge(EngineRecording(RecordedFiles(path), source), open_oracle(source))


@pytest.mark.parametrize("name", RIGHT)
def test_nothing_is_blamed_in_a_right_recording(name):
    """The recordings were made by tests/support/make_rank_recordings.py."""
    judgement = judged(RECORDINGS / CASES[name]["folder"], CASES[name]["model"])
    assert judgement.result.blamed() == []
    assert max(finding.ratio for finding in judgement.result.findings) < 0.8
    assert {finding.rank for finding in judgement.result.findings} == {0, 1}
    assert not [step for step in judgement.missing if step.endswith("out_partial")]


@pytest.mark.parametrize("name", FAULTY)
def test_the_rank_and_its_first_wrong_operation_are_named_and_explained(name):
    case = CASES[name]
    judgement = judged(RECORDINGS / case["folder"], case["model"])
    first = judgement.result.blamed()[0]
    assert (first.name.partition("/")[2], first.rank) == (case["step"], case["rank"])
    assert case["words"] in judgement.explanation


def test_a_sum_of_16_bit_terms_may_be_rounded_after_each_addition():
    """NCCL and Gloo round the sum of eight ranks seven times."""
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(40, 128)).astype(ml_dtypes.bfloat16) for _ in range(8)]  # [T, D] each
    found = functools.reduce(np.add, parts)  # [T, D]
    error = difference_of(found, expected.total(parts).value).relative
    assert error > expected.total(parts).bounds(found.dtype)[0]
    assert error < 0.8 * expected.total(parts, rounds_each=True).bounds(found.dtype)[0]


# --- the command ----------------------------------------------------------------------------------------


def test_the_command_names_the_rank(capsys):
    code = main(["judge", str(RECORDINGS / "kv-of-rank-0"), "--model", str(GOLDENS / "llama2")])
    *_, verdict, mistake = capsys.readouterr().out.splitlines()
    assert code == 1
    assert verdict.startswith("first wrong operation: prefill/layers.1.attn.k, layer 1, rank 1: relative")
    assert mistake == "what it seems to compute: the rows of the weight are those of rank 0"


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """A trace of minitp with the arrays of each of its seven ranks, and one in which they are assembled."""
    source, passes = open_model(str(GOLDENS / "qwen2"), 7), passes_of(5, 1)
    wanted = wanted_steps(source.plan, passes)
    paths = {name: tmp_path_factory.mktemp("traces") / f"{name}.safetensors" for name in ("ranks", "whole")}

    def write(comm):
        model = load_model(source, comm, open_device())
        for name, path in paths.items():
            write_trace(path, source, model, [3, 50, 7, 7, 91], passes, wanted, per_rank=name == "ranks")

    run_threads(7, write)
    return paths


def test_a_trace_with_the_arrays_of_each_rank(traces, capsys):
    assert main(["judge", str(traces["ranks"])]) == 0
    assert "(630 arrays on 7 ranks)" in capsys.readouterr().out


def test_an_assembled_trace_says_so(traces, tmp_path, capsys):
    assert main(["judge", str(traces["whole"])]) == 0
    assert "(90 arrays assembled from 7 ranks)" in capsys.readouterr().out
    with safe_open(traces["whole"], "np") as file:
        arrays, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    arrays["prefill/layers.0.mlp.act"] *= 2
    save_file(arrays, tmp_path / "wrong.safetensors", metadata)
    assert main(["judge", str(tmp_path / "wrong.safetensors")]) == 1
    assert "prefill/layers.0.mlp.act, layer 0, rank all: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda folder: (folder / "rank0.safetensors").unlink(),
            "has files of 1 rank up to rank 1, but none of rank 0",
        ),
        (
            lambda folder: (folder / "rank1.safetensors").unlink(),
            "it is rank 0 of 2, in a recording of 1 file; record",
        ),
        (
            lambda folder: shutil.rmtree(folder) or folder.mkdir(),
            "no arrays found; expected a .safetensors or .npz file for each rank",
        ),
        (
            lambda folder: shutil.copy(RECORDINGS / "no-sum" / "rank1.safetensors", folder),
            "its tokens or passes are not those of rank 0; all ranks must run the same sequence",
        ),
        (
            lambda folder: shutil.copy(folder / "rank0.safetensors", folder / "rank1.safetensors"),
            "it is rank 0 of 2, in a recording of 2 files; record all ranks into an empty",
        ),
    ],
)
def test_a_folder_that_is_not_one_run_is_refused(change, words, tmp_path, capsys):
    folder = tmp_path / "engine"
    shutil.copytree(RECORDINGS / "llama", folder)
    change(folder)
    assert main(["judge", str(folder), "--model", str(GOLDENS / "llama2")]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1


def test_the_file_of_one_rank_is_refused(capsys):
    path = RECORDINGS / "llama" / "rank1.safetensors"
    assert main(["judge", str(path), "--model", str(GOLDENS / "llama2")]) == 2
    assert "record all ranks into an empty folder, and judge the folder" in capsys.readouterr().err


def test_the_report_has_the_rank_and_the_mistake(tmp_path, capsys):
    page, folder = tmp_path / "judge.html", RECORDINGS / "kv-of-rank-0"
    options = ["--model", str(GOLDENS / "llama2"), "--report", str(page)]
    assert main(["judge", str(folder), *options]) == 1
    assert f"report: {page}" in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert "transformers, llama: " in text
    assert "layer 1, rank 1: " in text
    assert "what it seems to compute: the rows of the weight are those of rank 0" in text
    assert "docs/judge.md" in text


@pytest.mark.parametrize("split", ["3,1", "nonsense", "auto"])
def test_shares_without_an_engine_are_refused(split, refused):
    assert f"--split {split}" in refused("judge", RECORDINGS / "llama", "--split", split).replace("'", "")
