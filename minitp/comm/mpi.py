"""Ranks as MPI processes that send each value to every other rank in a separate message.

    rank 0  --a-->  rank 1, rank 2
    rank 1  --b-->  rank 0, rank 2
    rank 2  --c-->  rank 0, rank 1

An MPI collective would need fewer messages among many ranks, but it could not tell which rank it is waiting
for. Within a host ranks use shared memory instead, so usually only one rank per host sends messages.
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
from minitp.util import dev_shm
from minitp.util.environment import local_ranks
from minitp.util.format import counted

LAST_WORDS_S = 0.3  # time for mpirun to forward a rank's output before the abort
ARRAY, OBJECT = 1, 2  # message tags


@dataclass(frozen=True)
class Process:
    """A rank of the job, with its process id and its host."""

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
        The number of ranks that mpirun or srun says it started. If MPI finds a different number, mpirun and
        mpi4py belong to two different MPIs, and each process would run as the only rank.
    world : mpi4py.MPI.Comm or None
        The communicator of the ranks; None for all ranks of the group.
    group : groups.Group or None
        The replica group of the ranks; None if all ranks that were started are one group.

    Raises
    ------
    RankError
        On all ranks, if the number of ranks is not the expected one, if ranks have different versions of
        minitp, or if there is too little shared memory.
    """

    transport = "mpi"

    def __init__(self, expected=None, world=None, group=None):
        if expected is not None:
            dev_shm.check_room(local_ranks(os.environ, expected), starting=False)
        self._mpi = MPI = import_mpi()
        self._job = MPI.COMM_WORLD
        self._world = world or (group.mpi if group else self._job)
        super().__init__(self._world.Get_rank(), self._world.Get_size())
        self.group = group
        if group is not None:
            self.all_groups = group.all_groups
        self._others = [rank for rank in range(self.size) if rank != self.rank]
        if expected is not None and expected != self.size:
            library = MPI.Get_library_version().split(",")[0].split("\n")[0].strip("\0 ")
            launcher, remedy = "mpirun", "use the mpirun of that MPI"
            if os.environ.get("SLURM_STEP_NUM_TASKS") and not os.environ.get("PMI_SIZE"):
                launcher, remedy = "srun", "use srun --mpi=pmi2, or another type that srun --mpi=list shows"
            raise RankError(
                f"{launcher} started {counted(expected, 'process')} but mpi4py sees a world of {self.size}: "
                f"they belong to different MPIs (mpi4py uses {library}); {remedy}"
            )
        own = (__version__, self._job.Get_rank(), os.getpid(), platform.node())
        gathered = self._world.allgather(own)  # plain types, which any version of minitp can unpickle
        dev_shm.delete_mapped_files()  # all ranks have mapped them by now
        self._processes = [Process(*fields) for _, *fields in gathered]
        for process, (version, *_) in zip(self._processes, gathered, strict=True):
            if version != gathered[0][0]:
                raise RankError(
                    f"{self._processes[0]} has minitp {gathered[0][0]} and {process} has {version}; "
                    "install the same version on all hosts"
                )

    def name(self, rank):
        process = self._processes[rank]
        several = any(other.host != process.host for other in self._processes)
        return f"rank {process.rank} on {process.host}" if several else f"rank {process.rank}"

    def agree(self, error=None):
        """Agree as Comm.agree does, with the ranks of all groups, which all run the same phases."""
        if self.group is None:
            super().agree(error)
        else:
            self.all_groups.agree(error)

    def split(self, color, key=0):
        """Return the mpi4py communicator of the ranks of this Comm that pass the same `color`."""
        return self._world.Split(color, key)

    def split_by_host(self):
        """Return the mpi4py communicator of the ranks of this Comm on this host."""
        return self._world.Split_type(self._mpi.COMM_TYPE_SHARED)

    def broadcast(self, value):
        if self.rank != 0:
            return self._receive(0)
        self._complete(self._start_sending(value))
        return value

    def allgather_object(self, value):
        return self._exchange(value, patient=True)

    def close(self):
        """Wait for all ranks once more, because MPI_Finalize would wait for a missing one forever."""
        self._exchange(None, patient=False)

    def local_rank(self):
        """Return this rank's index among all ranks of its host, whatever their groups."""
        if self.group is not None:
            return self.group.local_rank
        node = self.split_by_host()
        rank = node.Get_rank()
        node.Free()
        return rank

    def abort(self, exit_code):
        time.sleep(LAST_WORDS_S)
        self._job.Abort(exit_code)  # the whole job: aborting only `world` would lose the exit code
        os._exit(exit_code)  # MPICH's Abort may return

    def new_wait(self, late, patient=False):
        """Return a Backoff for a wait of this rank; late() returns the ranks that are still missing."""

        first = 0 if self.group is None else self.group.first

        def names():
            late_processes = [self._processes[rank] for rank in late()]
            return [str(process) for process in late_processes if process.rank != first]

        own = self._processes[self.rank]
        return Backoff(str(own), names, gives_up=own.rank == first, patient=patient)

    def _gather_and_combine(self, x, sizes, combine):
        parts = [np.empty(size, x.dtype) for size in sizes]
        parts[self.rank][:] = x.reshape(-1)
        own = self._bytes(parts[self.rank])
        pending = [(r, self._world.Irecv(self._bytes(parts[r]), r, ARRAY)) for r in self._others]
        pending += [(r, self._world.Isend(own, r, ARRAY)) for r in self._others]
        self._complete(pending)
        return combine(parts)

    def _exchange(self, value, patient):
        """Gather objects as `allgather_object` does; if not `patient`, rank 0 gives up after a minute."""
        sending = self._start_sending(value)
        values = [value if r == self.rank else self._receive(r, patient) for r in range(self.size)]
        self._complete(sending, patient)
        return values

    def _start_sending(self, value):
        """Start sending an object to all other ranks; return a (rank, request) for each."""
        data = self._bytes(np.frombuffer(pickle.dumps(value), np.uint8))
        return [(r, self._world.Isend(data, r, OBJECT)) for r in self._others]

    def _receive(self, source, patient=False):
        """Return the next object from a rank."""
        status, wait = self._mpi.Status(), None
        while (message := self._world.Improbe(source, OBJECT, status)) is None:
            wait = wait or self.new_wait(lambda: [source], patient)
            wait.pause()
        data = np.empty(status.Get_count(self._mpi.BYTE), np.uint8)
        self._complete([(source, message.Irecv(self._bytes(data)))], patient)
        return pickle.loads(data)

    def _complete(self, pending, patient=False):
        """Wait until all `pending` messages, a list of (rank, request), are complete."""
        requests, wait = [request for _, request in pending], None
        while not self._mpi.Request.Testall(requests):
            wait = wait or self.new_wait(
                lambda: sorted({rank for rank, request in pending if not request.Test()}), patient
            )
            wait.pause()

    def _bytes(self, x):
        """Return an array as an MPI buffer of bytes, because MPI has no bfloat16."""
        return [x.view(np.uint8), self._mpi.BYTE]


def import_mpi():
    """Import mpi4py.MPI; raise RankError if it cannot load an MPI library."""
    try:
        with warnings.catch_warnings():  # MpiComm explains this fault better than the warning
            warnings.filterwarnings("ignore", "suspicious MPI execution environment", RuntimeWarning)
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise RankError(
            f"mpi4py cannot load an MPI library ({one_line(error)[:80]}); "
            "install one: pip install 'minitp[mpi]'"
        ) from error
    return MPI
