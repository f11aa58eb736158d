"""Ranks as MPI processes: every value goes to every rank as a message of its own.

    rank 0  --a-->  rank 1, rank 2
    rank 1  --b-->  rank 0, rank 2
    rank 2  --c-->  rank 0, rank 1

A collective of MPI's would need fewer messages among many ranks, but could not say whom it waits for. Within
a host shared memory takes over, so those that send here are mostly one a host, and few.
"""

import os
import pickle
import platform
import time
import warnings
from dataclasses import dataclass

import numpy as np

from minitp import __version__
from minitp.comm.base import Comm
from minitp.comm.wait import Backoff
from minitp.errors import RankError, one_line

LAST_WORDS_S = 0.3  # for mpirun to pass on what a rank has said: it may abort first
ARRAY, OBJECT = 1, 2  # tags


@dataclass(frozen=True)
class Process:
    """A rank of the job, and where it runs."""

    rank: int
    pid: int
    host: str

    def __str__(self):
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


class MpiComm(Comm):
    """Ranks as MPI processes, through mpi4py.

    Parameters
    ----------
    expected : int or None
        The number of ranks that the launcher says it started. Another world means that mpirun and mpi4py
        belong to two different MPIs, and that every process would believe itself alone.
    world : mpi4py.MPI.Comm or None
        These ranks; None: all that were started.

    Raises
    ------
    RankError
        on all ranks, if the world is not the expected one, or ranks have different versions of minitp.
    """

    def __init__(self, expected=None, world=None):
        self._mpi = MPI = import_mpi()
        self._job = MPI.COMM_WORLD
        self._world = self._job if world is None else world
        super().__init__(self._world.Get_rank(), self._world.Get_size())
        self._others = [rank for rank in range(self.size) if rank != self.rank]
        if expected is not None and expected != self.size:
            library = MPI.Get_library_version().split(",")[0].split("\n")[0].strip("\0 ")
            who, way_out = "mpirun", "use the mpirun of that one"
            if "SLURM_STEP_NUM_TASKS" in os.environ and "PMI_SIZE" not in os.environ:
                who, way_out = "srun", "give srun --mpi=pmi2, or another that srun --mpi=list shows"
            raise RankError(
                f"{who} started {expected} processes but mpi4py sees a world of {self.size}: they belong to "
                f"different MPIs (mpi4py uses {library}); {way_out}"
            )
        me = (__version__, self._job.Get_rank(), os.getpid(), platform.node())
        everyone = self._world.allgather(me)  # nothing of ours, which another version might not understand
        self._processes = [Process(*place) for _, *place in everyone]
        for process, (version, *_) in zip(self._processes, everyone, strict=True):
            if version != everyone[0][0]:
                raise RankError(
                    f"{self._processes[0]} has minitp {everyone[0][0]} and {process} {version}; "
                    "install the same on all hosts"
                )

    def name(self, rank):
        process = self._processes[rank]
        several = any(other.host != process.host for other in self._processes)
        return f"rank {process.rank} on {process.host}" if several else f"rank {process.rank}"

    def broadcast(self, value):
        if self.rank != 0:
            return self._receive(0)
        self._complete(self._start_sending(value))
        return value

    def allgather_object(self, value):
        return self._exchange(value, patient=True)

    def close(self):
        """The last meeting, for what follows is MPI's, which would wait for a rank that does not come."""
        self._exchange(None, patient=False)

    def local_rank(self):
        node = self._job.Split_type(self._mpi.COMM_TYPE_SHARED)
        rank = node.Get_rank()
        node.Free()
        return rank

    def abort(self, exit_code):
        time.sleep(LAST_WORDS_S)
        self._job.Abort(exit_code)  # of only a part of it the exit code would be lost
        os._exit(exit_code)  # MPICH's Abort may return

    def new_wait(self, late, patient=False):
        """A Backoff of this rank for the ranks late() of this Comm."""

        def names():
            late_ones = [self._processes[rank] for rank in late()]
            return [str(process) for process in late_ones if process.rank != 0]

        me = self._processes[self.rank]
        return Backoff(str(me), names, gives_up=me.rank == 0, patient=patient)

    def _gather_and_combine(self, x, sizes, combine):
        parts = [np.empty(size, x.dtype) for size in sizes]
        parts[self.rank][:] = x.reshape(-1)
        mine = self._bytes(parts[self.rank])
        under_way = [(r, self._world.Irecv(self._bytes(parts[r]), r, ARRAY)) for r in self._others]
        under_way += [(r, self._world.Isend(mine, r, ARRAY)) for r in self._others]
        self._complete(under_way)
        return combine(parts)

    def _exchange(self, value, patient):
        """As `allgather_object`; if it is not patient, rank 0 gives up."""
        sending = self._start_sending(value)
        values = [value if r == self.rank else self._receive(r, patient) for r in range(self.size)]
        self._complete(sending, patient)
        return values

    def _start_sending(self, value):
        """Send an object to all others; (rank, request) of each."""
        data = self._bytes(np.frombuffer(pickle.dumps(value), np.uint8))
        return [(r, self._world.Isend(data, r, OBJECT)) for r in self._others]

    def _receive(self, source, patient=False):
        """The next object from a rank."""
        status, wait = self._mpi.Status(), None
        while (message := self._world.Improbe(source, OBJECT, status)) is None:
            wait = wait or self.new_wait(lambda: [source], patient)
            wait.pause()
        data = np.empty(status.Get_count(self._mpi.BYTE), np.uint8)
        self._complete([(source, message.Irecv(self._bytes(data)))], patient)
        return pickle.loads(data)

    def _complete(self, under_way, patient=False):
        """Wait until messages, (rank, request) each, have arrived."""
        requests, wait = [request for _, request in under_way], None
        while not self._mpi.Request.Testall(requests):
            wait = wait or self.new_wait(
                lambda: sorted({r for r, one in under_way if not one.Test()}), patient
            )
            wait.pause()

    def _bytes(self, x):
        """An array as MPI takes it: as bytes, for MPI has no bfloat16."""
        return [x.view(np.uint8), self._mpi.BYTE]


def import_mpi():
    """mpi4py.MPI, or RankError."""
    try:
        with warnings.catch_warnings():  # of two different MPIs, on which MpiComm has more to say
            warnings.filterwarnings("ignore", "suspicious MPI execution environment", RuntimeWarning)
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise RankError(
            f"mpi4py finds no MPI library ({one_line(error)[:80]}); install one: pip install 'minitp[mpi]'"
        ) from error
    return MPI
