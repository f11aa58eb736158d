"""Tests of the tour: it is short, imports nothing of minitp, and computes what the model computes."""

import ast
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from on_gpu import ENVIRONMENT
from paths import GOLDENS
from running import START_S, under_mpirun
from tiny import UNEVEN, byte_tokenizer, write_tiny

from minitp.comm import run_threads
from minitp.oracle import Oracle

with mock.patch.dict(os.environ):  # the tour sets the BLAS threads of its own process
    from minitp import tour

TOUR = [sys.executable, "-m", "minitp.tour"]
SHAPE = UNEVEN | {"vocab_size": 258, "rms_norm_eps": 1e-3, "max_position_embeddings": 20}
golden_names = pytest.mark.parametrize("name", ["llama2", "tinyllama", "mistral-v02", "mistral-v03"])

# About a hundred float32 roundings of 6e-8, in logits up to 10, add up to 1e-5. A head, position or term in
# the wrong place changes logits by at least 0.01.
CLOSE = {"rtol": 0, "atol": 1e-4}


class ThreadRanks:
    """Ranks as threads of this process, with the methods of MpiRanks that the tour uses."""

    xp = np

    def __init__(self, comm):
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.all_reduce, self.world = comm.all_reduce, SimpleNamespace(bcast=comm.broadcast)

    def all_gather(self, part):
        return np.concatenate(self.comm.allgather_object(part))


def on_ranks(directory, size, function):
    """Return function(model, ranks) of each rank, for a model without end-of-text tokens."""
    config = tour.read_config(directory) | {"eos_token_id": []}

    def rank(comm):
        ranks = ThreadRanks(comm)
        return function(tour.load_model(directory, config, ranks), ranks)

    return run_threads(size, rank)


def golden_of(name):
    with np.load(GOLDENS / name / "golden.npz") as file:
        return dict(file)


def run_tour(argv, ranks, **variables):
    """Run the tour on MPI ranks; return (exit code, stdout, stderr) and check that no process is left."""
    return under_mpirun(argv, ranks, worker=TOUR, **variables).end(START_S)


# --- the file -------------------------------------------------------------------------------------------


def test_the_file_is_short_and_imports_nothing_of_minitp():
    text = Path(tour.__file__).read_text()
    assert text.count("\n") <= 300
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.partition(".")[0])
    assert imported - sys.stdlib_module_names == {"numpy", "safetensors", "tokenizers", "mpi4py", "cupy"}


# --- the numbers ----------------------------------------------------------------------------------------


@golden_names
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_greedy_tokens(name, size):
    """The tokens are those of transformers, and so of `minitp generate` (test_goldens)."""
    golden = golden_of(name)
    prompt, expected = golden["prompt"].tolist(), golden["continuation"].tolist()
    tokens = on_ranks(GOLDENS / name, size, lambda *rank: list(tour.generate(*rank, prompt, len(expected))))
    assert tokens == [expected] * size


def check_logits(directory, tokens, size):
    """Run a prompt in several passes, then token by token; check each pass's logits against the oracle."""
    stops = [7, 8, 13, *range(14, len(tokens) + 1)]

    def last_logits(model, ranks):
        shape = model.K_r, len(tokens), model.config["head_dim"]
        cache = [[np.full(shape, np.nan, np.float32) for _ in "kv"] for _ in model.layers]
        starts = [0, *stops[:-1]]
        passes = zip(starts, stops, strict=True)
        return [tour.forward(model, ranks, tokens[start:stop], start, cache) for start, stop in passes]

    expected = Oracle.from_directory(directory).logits(tokens)[[stop - 1 for stop in stops]]
    for logits in on_ranks(directory, size, last_logits):
        assert logits[0].dtype == np.float32
        np.testing.assert_allclose(logits, expected, **CLOSE)


@golden_names
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_logits(name, size):
    check_logits(GOLDENS / name, golden_of(name)["prompt"].tolist(), size)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A model with nine query heads, three KV heads and sizes that do not divide evenly."""
    return write_tiny(tmp_path_factory.mktemp("models") / "uneven", **SHAPE)


@pytest.mark.parametrize("size", range(1, 10))
def test_logits_with_uneven_heads(uneven, size):
    check_logits(uneven, list(range(3, 250, 13)), size)


def test_large_gates_do_not_overflow():
    layer = SimpleNamespace(mlp_norm=np.float32([1, 1]), w_gate=np.float32([[-200], [0]]))
    layer.w_up, layer.w_down = np.ones((2, 1), np.float32), np.ones((1, 2), np.float32)
    model = SimpleNamespace(config={"rms_norm_eps": 0.0})
    with np.errstate(over="raise", invalid="raise"):
        np.testing.assert_allclose(
            tour.feed_forward(np, model, layer, np.ones((1, 2), np.float32)), 0, atol=1e-30
        )


# --- the command ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_of_bytes(tmp_path_factory):
    """A model that generates incomplete characters, and ends at a token of generation_config.json.

    Its tokenizer.json cuts and pads prompts, which does not count.
    """
    directory = write_tiny(tmp_path_factory.mktemp("models") / "bytes", seed=4)
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 213}))
    return directory


@pytest.mark.mpi
@pytest.mark.parametrize("model", ["demo", "text", "bytes"])
def test_the_tour_prints_the_same_text_as_minitp_generate(model, model_of_bytes):
    """The model `text` has its end-of-text token in config.json, and bfloat16 weights."""
    prompt = str(golden_of("text")["prompt_text"]) if model == "text" else "Once upon a time"
    directory = {"text": GOLDENS / "text", "bytes": model_of_bytes}.get(model)
    argv = [prompt, "-n", "20"] if directory is None else [prompt, "-n", "20", "--model", str(directory)]
    code, text, _ = under_mpirun(["generate", *argv], 2).end(START_S)
    assert code == 0
    assert run_tour(argv, 4) == (0, prompt + text, "")


@pytest.mark.mpi
def test_gpus_generate_the_same_tokens(uneven):
    """The GPUs and NCCL are the stand-in for CuPy; the tokens fill the context."""
    argv = ["--tokens", "5,200,7", "--model", uneven, "-n", "30"]
    expected = run_tour(argv, 1)
    assert expected[0] == 0
    assert len(expected[1].split()) == 20 - 3
    assert run_tour([*argv, "--gpu"], 3, **ENVIRONMENT) == expected


# --- what is refused ------------------------------------------------------------------------------------

CHANGES = [
    {"model_type": "qwen2"},
    {"hidden_act": "gelu"},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"sliding_window": 8},
    {"model_type": "mistral"},  # a window of 4096 by default
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"rope_scaling": {"type": "default"}},
    {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 2.0}},
    {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    {"quantization_config": {"bits": 4}},
]
ALL_CASES = """
import json, sys
from minitp import tour
print(json.dumps([tour.main(argv) for argv in json.loads(sys.argv[1])]))
"""


def refusals(cases, ranks=2, **variables):
    """Run all cases on the same ranks; return the line on stderr of each."""
    worker = [sys.executable, "-c", ALL_CASES]
    argv = [json.dumps([[str(part) for part in case] for case in cases])]
    code, out, err = under_mpirun(argv, ranks, worker=worker, **variables).end(START_S)
    assert (code, json.loads(out)) == (0, [2] * len(cases)), err  # only rank 0's stdout is open
    lines = err.splitlines()
    assert len(lines) == len(cases), err
    assert all(line.startswith("minitp tour: ") for line in lines)
    return lines


@pytest.mark.mpi
def test_models_that_differ_from_llama_are_rejected(tiny, tmp_path):
    fields = json.loads((tiny / "config.json").read_text())
    for number, change in enumerate(CHANGES):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "config.json").write_text(json.dumps(fields | change))
    lines = refusals([["--model", tmp_path / str(number)] for number in range(len(CHANGES))])
    for line, change in zip(lines, CHANGES, strict=True):
        field, value = list(change.items())[-1]
        if field == "rope_parameters":
            field, value = list(value.items())[1]
        field, value = ("sliding_window", 4096) if value == "mistral" else (field, value)
        assert line.endswith(f"config.json: {field} {value!r} is not supported; use `minitp generate`")


@pytest.mark.mpi
def test_missing_files_and_bad_prompts_are_rejected(tiny, tmp_path):
    (tmp_path / "no-weights").mkdir()
    (tmp_path / "no-weights" / "config.json").write_text((tiny / "config.json").read_text())
    cases = {
        "nowhere": ["Hello", "--model", tmp_path / "nowhere"],
        "llama2/tokenizer.json": ["Hello", "--model", GOLDENS / "llama2"],
        "no-weights/model.safetensors": ["--tokens", "1,2", "--model", tmp_path / "no-weights"],
        "token id 258 is outside the vocabulary, 0 to 257": ["--tokens", "1,258", "--model", tiny],
        "'two'": ["--tokens", "1,two", "--model", tiny],
        "--max-new-tokens 0: expected at least 1": ["--tokens", "1,2", "--model", tiny, "-n", "0"],
        "the prompt has 0 tokens; expected 1 to 511": ["", "--model", tiny],
    }
    lines = refusals(cases.values())
    for line, part in zip(lines, cases, strict=True):
        assert part in line


@pytest.mark.mpi
def test_a_missing_demo_model_and_too_many_ranks_exit_with_code_2(tmp_path, tiny):
    line = "minitp tour: there is no demo model yet; `minitp generate Hello` downloads it\n"
    assert run_tour(["Hello"], 2, XDG_CACHE_HOME=str(tmp_path)) == (2, "", line)
    line = "minitp tour: use at most {} ranks (one per attention head, FFN column and token)\n"
    assert run_tour(["Hello", "--model", tiny], 5) == (2, "", line.format(4))
    small = write_tiny(tmp_path / "small", vocab_size=3)
    assert run_tour(["--tokens", "1,2", "--model", small], 4) == (2, "", line.format(3))


@pytest.mark.mpi
def test_a_usage_error_is_printed_once(tiny):
    code, out, err = run_tour(["Hello", "--model", tiny, "--tp", "2"], 2)
    assert (code, out) == (2, "")
    assert err.count("unrecognized arguments: --tp 2") == 1


# --- one failing rank -----------------------------------------------------------------------------------

ONE_FAILS = """
import sys
from mpi4py import MPI
from minitp import tour
def fail(*_): raise {error}
if MPI.COMM_WORLD.rank == 1: tour.{function} = fail
sys.exit(tour.main())
"""


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("function", "error", "code", "line"),
    [
        ("load_model", "OSError('no such file')", 2, "no such file"),
        ("feed_forward", "MemoryError('too much')", 3, "rank 1 failed: MemoryError('too much')"),
    ],
)
def test_a_failing_rank_ends_the_job(tiny, function, error, code, line):
    """The other ranks are waiting for it in a collective."""
    worker = [sys.executable, "-c", ONE_FAILS.format(function=function, error=error)]
    exit_code, _, err = under_mpirun(["Hello", "--model", tiny], 3, worker=worker).end(START_S / 6)
    assert exit_code == code
    assert f"minitp tour: {line}\n" in err
