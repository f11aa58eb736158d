"""The files of shared memory: jobs leave none however they end, and too little of it has a clear error."""

import os
import re
import signal
import sys

import pytest
import small_shm
from running import END_S, START_S, WORKER, Running, result_of
from served import Served, write_chatty
from tiny import write_tiny

from minitp.launch.mpirun import find_mpirun

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(bool(small_shm.missing()), reason=str(small_shm.missing())),
]


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """Return the options of a model that generates for minutes."""
    directory = tmp_path_factory.mktemp("models") / "endless"
    write_tiny(directory, tokenizer=False, max_position_embeddings=1_000_000)
    return ["--model", directory, "--tokens", "1,2,3", "-n", "400000"]


@pytest.fixture
def memory():
    with small_shm.shared_memory("size=8m") as memory:
        yield memory


# --- too little of it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["generate", "tour", "mpirun"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            "size=2m",
            r"2 ranks need 3\.1 MB of shared memory, but /dev/shm has only 2\.1 MB, with 2\.1 MB free; ",
        ),
        ("size=8m,ro", "/dev/shm cannot be written, but ranks on one host need it; mount a writable "),
    ],
)
def test_too_little_memory(tiny, command, options, expected):
    argv = [*WORKER, command, "Hello", "--model", tiny, "-n", "4", "--tp", "2"]
    if command == "mpirun":
        argv = [find_mpirun(), "-n", "2", *WORKER, "generate", "Hello", "--model", tiny, "-n", "4"]
    with small_shm.shared_memory(options) as memory:
        code, out, err = Running(memory.inside(*argv)).end(START_S)
    said = re.findall("minitp: .*", err)  # perhaps after a part of what the other rank was writing
    assert (code, out, len(said)) == (3, "", 1), err
    assert re.match(f"minitp: {expected}", said[0])
    assert len(said[0]) < 300
    assert command == "mpirun" or err == said[0] + "\n", "mpirun itself reports the exit"


@pytest.mark.parametrize("megabytes", [4, 16])  # with 16, UCX crashes unless it is told not to use /dev/shm
def test_enough_memory(tiny, megabytes):
    argv = ["generate", "Hello", "--model", tiny, "-n", "4", "--json", "--tp", "2"]
    with small_shm.shared_memory(f"size={megabytes}m") as memory:
        assert len(result_of(Running(memory.inside(*WORKER, *argv)))["token_ids"]) == 4


def test_memory_is_used_up_by_a_long_prompt(tmp_path):
    """Two ranks exchange arrays of 2 MB through slots that did not take memory before."""
    model = write_tiny(tmp_path, tokenizer=False, hidden_size=1024, num_hidden_layers=1, head_dim=8)
    argv = ["generate", "--tokens", ",".join(["1"] * 510), "--model", model, "--tp", "2"]
    with small_shm.shared_memory("size=4m") as memory:
        code, _, err = Running(memory.inside(*WORKER, *argv)).end(START_S)
    said = re.findall("minitp: .*", err)  # perhaps after a part of what the other rank was writing
    assert (code, len(said)) == (3, 1), err
    assert re.search(
        r"rank [01] \(pid \d+\) died: bus error, most likely because /dev/shm has only 4\.2 MB, ", err
    )
    assert "docker run --shm-size=1g" in said[0]


# --- nothing is left ------------------------------------------------------------------------------------


def test_five_restarts_in_eight_megabytes(memory, tmp_path):
    model = write_chatty(tmp_path / "model")
    served = Served(model, "--tp", 2, "--restart", command=memory.inside(sys.executable, "-m", "minitp"))
    try:
        small_shm.restart(served, 5)
        assert memory.files() == []
    finally:
        served.stop()


@pytest.mark.parametrize(
    ("command", "number"),
    [
        ("generate", signal.SIGKILL),
        ("generate", signal.SIGTERM),
        ("mpirun", signal.SIGKILL),
        ("mpirun", signal.SIGTERM),
        ("tour", signal.SIGTERM),
    ],
)
def test_a_killed_job_leaves_no_file(memory, endless, command, number):
    argv = [*WORKER, command, *endless, "--tp", "2"]
    if command == "mpirun":
        argv = [find_mpirun(), "-n", "2", *WORKER, "generate", *endless]
    running = Running(memory.inside(*argv))
    running.wait_for_output()
    os.kill(running.process.pid, number)
    running.process.communicate(timeout=END_S)
    running.check_nothing_is_left(within=END_S)
    assert memory.files() == []


def test_a_killed_rank_leaves_no_file(memory, endless):
    running = Running(memory.inside(*WORKER, "generate", *endless, "--tp", "2"))
    running.wait_for_output()
    lines = running.processes().items()
    os.kill(max(pid for pid, line in lines if re.match(r"\S*python", line)), signal.SIGKILL)
    assert running.end(END_S)[0] == 3
    assert memory.files() == []
