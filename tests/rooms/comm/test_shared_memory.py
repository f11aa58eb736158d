"""Tests of collectives through shared memory, on one host and several: the same bits as with messages."""

import subprocess
import sys

import pytest
from tiny import write_tiny

from minitp.comm.shared_memory import SLOT_BYTES
from minitp.launch.mpirun import find_mpirun

LIMIT_S = 120

# The program of each rank. All ranks draw the same numbers, so each knows the data of the others.
COLLECTIVES = f"""
import sys, time
import ml_dtypes
import numpy as np
from minitp.comm.mpi import MpiComm
from mpi4py import MPI
from minitp.comm.hierarchical import HierarchicalComm
from minitp.launch.transport import select_host_comm
from minitp.comm.shared_memory import SharedMemoryComm

mpi, host_of = MpiComm(), [int(host) for host in sys.argv[1]]
if len(set(host_of)) == 1:
    comm = select_host_comm(mpi, "shm")
    assert type(comm) is SharedMemoryComm and type(select_host_comm(mpi, "mpi")) is MpiComm
else:
    comm = HierarchicalComm(MPI.COMM_WORLD.Split(host_of[mpi.rank]))
rng, rank = np.random.default_rng(0), comm.rank
SLOT = {SLOT_BYTES}
for n in (1, 7, SLOT // 4, SLOT // 4 + 1, 5 * SLOT // 8, 0):
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        parts = rng.standard_normal((comm.size, n)).astype(dtype)
        if rng.random() < 0.3 and rank == rng.integers(comm.size):
            time.sleep(0.05)  # longer than the others spin
        total = comm.all_reduce(parts[rank])
        assert total.tobytes() == mpi.all_reduce(parts[rank]).tobytes(), (n, dtype)
        total[:] = 0  # must not change the result of another rank
for widths in ([3, 2, 2, 2], [0, 1, 0, 5], [SLOT // 8, 1, SLOT // 4 + 3, 2]):
    widths = widths[: comm.size]
    parts = [rng.standard_normal((3, width)).astype(np.float32) for width in widths]
    assert (comm.all_gather(parts[rank], widths) == np.concatenate(parts, axis=-1)).all(), widths
for value in (None, (5, False), "x" * (SLOT - 8), "y" * SLOT, b"z" * (3 * SLOT + 1), list(range(300_000))):
    assert comm.broadcast(value if rank == 0 else "ignored") == value
    assert comm.allgather_object(rank) == list(range(comm.size))
for i in range(4_000):  # many meetings in a row, without another wait between them
    x = np.full(5, 1 + i * comm.size + rank, np.float64)
    assert comm.all_reduce(x)[4] == sum(1 + i * comm.size + r for r in range(comm.size)), i
if rank == 0:
    print("all right", comm.size)
comm.close()
"""


def mpirun(ranks, *command):
    done = subprocess.run(
        [find_mpirun(), "-n", str(ranks), sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.mpi
@pytest.mark.parametrize("host_of", ["0", "0000", "0011", "010", "01"])
def test_collectives(host_of):
    """Run the collectives with each rank on the host of its digit; all hosts are really this machine."""
    ranks = len(host_of)
    assert mpirun(ranks, "-c", COLLECTIVES, host_of) == (0, f"all right {ranks}\n", "")


@pytest.mark.mpi
@pytest.mark.parametrize("transport", ["shm", "mpi"])
def test_all_transports_generate_the_same_tokens_and_exit_cleanly(tmp_path, transport):
    model = write_tiny(tmp_path / "model", num_hidden_layers=2)
    argv = ["generate", "--tokens", "1,2,3", "-n", "20", "--ignore-eos", "--json", "--model", model]
    for _ in range(3):  # a hang at exit would not happen in every run
        code, out, err = mpirun(3, "-m", "minitp", *map(str, argv), "--comm", transport)
        assert (code, err) == (0, "")
        single = subprocess.run(
            [sys.executable, "-m", "minitp", *map(str, argv), "--tp", "1"], capture_output=True, text=True
        )
        assert _tokens(out) == _tokens(single.stdout)


def _tokens(text):
    return text.partition('"token_ids"')[2].partition("]")[0]
