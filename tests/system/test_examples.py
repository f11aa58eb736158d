"""Tests of the examples: each runs, explains itself, and detects a wrong result of a rank."""

import os
import re
import subprocess
import sys

import pytest
from paths import EXAMPLES

from minitp.launch.mpirun import OPEN_MPI, find_mpirun

MODEL = "smollm2-135m"  # small, and uneven over four ranks: 9 query heads, 3 KV heads
TERMS = 1536  # number of terms in its longest sum, F
LIMIT_S = 120  # seconds for a short run on a busy machine

# Each example, its number of successive sums with LAYERS=2, its number of comparisons with the oracle, and a
# line of its output.
LADDER = [
    ("tp_attention", 4, 2, "rank 2: query heads 5..6, KV heads 1..2: w_qkv [576, 384]"),
    ("tp_ffn", 2, 1, "rank 3: columns 1152..1535: w_gate_up [576, 768], w_down [384, 576]"),
    ("tp_transformer_block", 6, 1, "rank 1: [576, 256], [128, 576], [576, 768], [384, 576]: 3.5 MB"),
    ("tp_full_model", 13, 1, "all-gather: logits [32, 49152]"),
    ("tp_generate", 13, 1, "16 new tokens after 32 random ones"),
    ("tp_generate_kvcache", 13, 1, "without a cache: the same tokens"),
    ("tp_replica_groups", 2, 1, "the all-reduce over [[0, 1], [2, 3]]: each rank gets"),
]

# Runs the example argv[1] with a changed all-reduce. `total` is the correct sum, `own` this rank's term.
TAMPERED = """
import runpy, sys
from minitp.comm.mpi import MpiComm
original = MpiComm.all_reduce
def all_reduce(self, own):
    total = original(self, own)
    return {result} if self.rank == 1 else total
MpiComm.all_reduce = all_reduce
del sys.argv[0]
sys.path.insert(0, {folder!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(command, folder, **variables):
    """Run a command to its end in an unrelated directory; return (exit code, stdout, stderr)."""
    environment = {**os.environ, **OPEN_MPI, "MODEL": MODEL, "LAYERS": "2", **variables}
    command = [str(part) for part in command]
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=LIMIT_S
    )
    return done.returncode, done.stdout, done.stderr


def alone(name, folder, **variables):
    return start([sys.executable, EXAMPLES / f"{name}.py"], folder, **variables)


def under_mpirun(name, folder, ranks=4, **variables):
    python = [find_mpirun(), "-n", ranks, sys.executable]
    return start([*python, EXAMPLES / f"{name}.py"], folder, **variables)


def tampered(name, folder, result):
    code = TAMPERED.format(result=result, folder=str(EXAMPLES))
    ranks = 4 if name == "tp_replica_groups" else 2
    python = [find_mpirun(), "-n", ranks, sys.executable]
    return start([*python, "-c", code, EXAMPLES / f"{name}.py"], folder, LAYERS="1")


def check_output(out, products, checks):
    """Check that the printed errors are those of float32, and that a time is printed for each."""
    errors = re.findall(r"error against the float64 oracle: (\S+); relative (\S+), allowed (\S+)$", out, re.M)
    assert len(errors) == checks, out
    for _, relative, allowed in errors:
        # Roundings are a random walk over the longest sum, for each successive sum; no float32 run is exact.
        assert 1e-9 < float(relative) < 2**-24 * TERMS**0.5 * products
        assert float(allowed) <= 2**-24 * TERMS**0.5 * products * 1.05, "printed with two digits"
    times = re.findall(r"^time.*?: .*?([0-9.]+) ms", out, re.M)
    assert len(times) == checks, out
    assert all(float(ms) > 0 for ms in times)


def test_every_example_is_in_the_table():
    assert {path.stem for path in EXAMPLES.glob("*.py")} - {"common"} == {name for name, *_ in LADDER}


@pytest.mark.mpi
@pytest.mark.parametrize(("name", "products", "checks", "printed"), LADDER)
def test_example_on_four_ranks(tmp_path, name, products, checks, printed):
    code, out, err = under_mpirun(name, tmp_path)
    assert (code, err) == (0, "")
    check_output(out, products, checks)
    assert printed in out
    assert "4 ranks on this CPU" in out


def test_example_without_mpirun(tmp_path):
    code, out, err = alone("tp_transformer_block", tmp_path)
    assert (code, err) == (0, "")
    check_output(out, products=6, checks=1)
    assert "1 rank on this CPU" in out


def test_help(tmp_path):
    for name, *_ in LADDER:
        code, out, err = start([sys.executable, EXAMPLES / f"{name}.py", "--help"], tmp_path)
        assert (code, err) == (0, "")
        assert f"mpirun -n 4 python examples/{name}.py" in out
        assert "LAYERS   number of layers" in out
        assert "oracle: " not in out, "the example did not run"


@pytest.mark.mpi
def test_other_arguments(tmp_path):
    command = [find_mpirun(), "-n", 2, sys.executable, EXAMPLES / "tp_ffn.py", "4"]
    code, out, err = start(command, tmp_path)
    assert (code, out) == (2, "")
    assert err == "tp_ffn.py 4: only --help is accepted; set MODEL and LAYERS\n"


def test_layers(tmp_path):
    code, out, _ = alone("tp_full_model", tmp_path, LAYERS="1")
    assert code == 0
    assert "1 of its layers" in out
    check_output(out, products=7, checks=1)


@pytest.mark.mpi
@pytest.mark.parametrize("name", [name for name, *_ in LADDER if name != "tp_generate"])
def test_a_wrong_sum_on_one_rank_is_found(tmp_path, name):
    """Give rank 1 its own term instead of the sum, which a check of rank 0 alone would not notice.

    (tp_generate shares its comparison with tp_generate_kvcache.)
    """
    code, out, err = tampered(name, tmp_path, "own")
    assert code == 1, out + err
    errors = [line for line in err.splitlines() if line.startswith(f"{name}.py: ")]
    assert len(errors) == 1, err
    assert re.search("rank [0-3] differs from the oracle: relative error [0-9.]+; at ", errors[0])
    assert "Traceback" not in err


@pytest.mark.mpi
def test_a_rank_that_fails_ends_the_others(tmp_path):
    code, _, err = tampered("tp_ffn", tmp_path, "1 / 0")
    assert code == 3, err
    assert "ZeroDivisionError" in err


@pytest.mark.mpi
def test_groups_of_unequal_size(tmp_path):
    code, out, err = under_mpirun("tp_replica_groups", tmp_path, ranks=3)
    assert (code, out) == (2, "")
    assert "tp_replica_groups.py: mpirun -n 3: cannot form 2 equal groups; use mpirun -n 4\n" in err


@pytest.mark.mpi
def test_a_bad_model_is_reported_once(tmp_path):
    code, out, err = under_mpirun("tp_attention", tmp_path, MODEL="gpt-2")
    assert (code, out) == (2, "")
    errors = [line for line in err.splitlines() if "tp_attention.py" in line]
    assert errors == [
        "tp_attention.py: MODEL=gpt-2: unknown model; choose from "
        "mistral-7b, llama-3-8b, tinyllama-1.1b, smollm2-135m"
    ]
    assert "Traceback" not in err


@pytest.mark.parametrize("layers", ["0", "-1", "two", "31", ""])
def test_bad_layers(tmp_path, layers):
    code, out, err = alone("tp_full_model", tmp_path, LAYERS=layers)
    assert (code, out) == (2, "")
    assert err == (f"tp_full_model.py: LAYERS={layers}: {MODEL} has 30 layers; choose from 1 to 30\n")
