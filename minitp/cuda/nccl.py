"""Collectives through NCCL, called by `cupy.cuda.nccl`, and a watchdog that ends what is stuck."""

import os
import sys
import tempfile
import threading
from collections import deque
from contextlib import contextmanager, suppress
from time import monotonic

import numpy as np

from minitp.cuda.comm import DeviceComm
from minitp.errors import RankError, one_line

PATIENCE_S = 8.0  # for work that has been given to the GPU; a step takes far less
START_S = 60.0  # for all ranks to come to NCCL, and NCCL to find its ways between their GPUs
LOOK_S = 0.25
SHARES_GPUS = 23000  # as NCCL counts its versions
LAST_RESORT_S = 2.0  # for a rank that an abort has not woken


class NcclComm(DeviceComm):
    """Ranks of one GPU each, through NCCL, on the rank's own stream.

    Rank 0 makes the unique id, the others get it through the host's Comm: if that fails, all learn so.
    Sums of 16-bit numbers are rounded at each of NCCL's steps, so they are less exact than `Comm`'s; but they
    have the same bits on all ranks.

    Parameters
    ----------
    host : Comm
    gpu : Gpu
    patience_s : float
        How long the GPU may take over what it has been given, before the job is ended.

    Raises
    ------
    AgreedError
        on all ranks, if one of them has no NCCL, or there is no unique id.
    RankError
        on a rank where the communicator cannot be made. The others wait for it inside NCCL, where nothing but
        the end of the job reaches them.
    """

    capturable = True

    def __init__(self, host, gpu, patience_s=PATIENCE_S):
        super().__init__(host, gpu)
        unique_id, self._watchdog = None, None
        with host.agreed():
            self._nccl = load_nccl()
            if host.rank == 0:
                unique_id = self._nccl.get_unique_id()
        unique_id, launches = host.broadcast(unique_id), shared_counts(host)
        self._communicator = self._joined(unique_id, launches)
        self._types = {
            "float32": self._nccl.NCCL_FLOAT32,
            "float16": self._nccl.NCCL_FLOAT16,
            "bfloat16": self._nccl.NCCL_BFLOAT16,
            "int32": self._nccl.NCCL_INT32,
        }
        self._watchdog = Watchdog(self._communicator, gpu, host, launches, patience_s)

    def _joined(self, unique_id, launches):
        """This rank's communicator, when all ranks have come for theirs."""

        def give_up():
            missing = [str(rank) for rank, count in enumerate(launches) if count == 0]
            who = f"rank {', '.join(missing)} did not come" if missing else "nobody is known to be missing"
            give_word(self.rank, f"NCCL has not come up within {START_S:g} s: {who}")
            self.host.abort(RankError.exit_code)

        launches[self.rank] = 1
        timer = threading.Timer(START_S, give_up)
        timer.daemon = True
        timer.start()
        try:
            return self._nccl.NcclCommunicator(self.size, unique_id, self.rank)
        except RuntimeError as error:  # NcclError
            raise RankError(f"NCCL does not come up: {one_line(error)}") from error
        finally:
            timer.cancel()

    def reduce_into(self, x, out):
        kind, add = self._types[x.dtype.name], self._nccl.NCCL_SUM
        with self._blamed("all-reduce"):
            self._communicator.allReduce(x.data.ptr, out.data.ptr, x.size, kind, add, self.gpu.stream.ptr)

    def gather_into(self, x, out):
        kind = self._types[x.dtype.name]
        with self._blamed("all-gather"):
            self._communicator.allGather(x.data.ptr, out.data.ptr, x.size, kind, self.gpu.stream.ptr)

    def check(self):
        self._watchdog.check()

    def launching(self):
        return self._watchdog.launching()

    def close(self):
        """Destroys the communicator; MPI must still be there."""
        self._watchdog.stop()
        self.gpu.stream.synchronize()
        self._communicator.destroy()
        self.host.close()

    def abort(self, exit_code):
        """The others' kernels wait for this rank's; NCCL must let go of them before the process can end."""
        if self._watchdog is not None:
            self._watchdog.stop()
            with suppress(RuntimeError):
                self._communicator.abort()
        self.host.abort(exit_code)

    @contextmanager
    def _blamed(self, what):
        try:
            yield
        except RuntimeError as error:  # NcclError
            self.check()
            raise RankError(f"NCCL's {what} failed: {one_line(error)}") from error


class Watchdog:
    """A thread that aborts the communicator when the GPU does not get through what it was given.

    At each launch the rank adds one to its number in memory that the ranks of a host share, and puts an event
    on the stream behind it; so whoever waits can say who has not come.
    """

    def __init__(self, communicator, gpu, host, launches, patience_s):
        self._communicator, self._gpu, self._host, self._patience = communicator, gpu, host, patience_s
        self._events, self._entered = deque(), None  # times of launches that are not through
        self._error, self._stopped = None, threading.Event()
        self._launches = launches  # of each rank, as far as they can be seen from here
        self._thread = threading.Thread(target=self._watch, name="NCCL watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def launching(self):
        """Work with collectives is being given to the GPU."""
        self.check()
        self._launches[self._host.rank] += 1
        self._entered = monotonic()
        try:
            yield
        except RuntimeError as error:  # of CUDA or NCCL; an aborted communicator says no more than that
            self.check()
            raise RankError(f"on the GPU: {one_line(error)}") from error
        event = self._gpu.cupy.cuda.Event(disable_timing=True)
        event.record(self._gpu.stream)
        self._events.append((self._entered, event))
        self._entered = None

    def check(self):
        """Raise the RankError that ended the communicator, if there is one."""
        if self._error is not None:
            raise self._error

    def stop(self):
        """Watch no more."""
        self._stopped.set()

    def _watch(self):
        while not self._stopped.wait(LOOK_S):
            while self._events and self._events[0][1].done:
                self._events.popleft()
            reason = self._trouble()
            if reason is not None:
                self._end(reason)
                return

    def _trouble(self):
        """What is wrong, or None."""
        try:
            self._communicator.check_async_error()
        except RuntimeError as error:  # NcclError
            return f"NCCL: {one_line(error)}"
        oldest = self._events[0][0] if self._events else self._entered
        if oldest is None or monotonic() - oldest < self._patience:
            return None
        mine = self._launches[self._host.rank]
        late = [str(rank) for rank, count in enumerate(self._launches) if count < mine]
        who = (
            f"rank {', '.join(late)} did not come" if late else "all ranks have come as far as is known here"
        )
        return f"stuck in a collective for {self._patience:g} s: {who}"

    def _end(self, reason):
        self._error = RankError(reason)
        with suppress(RuntimeError):
            self._communicator.abort()
        if not self._stopped.wait(LAST_RESORT_S):  # else the rank's own thread has woken and leaves
            give_word(self._host.rank, reason)
            self._host.abort(RankError.exit_code)


def give_word(rank, reason):
    """Say why the job ends, from a thread beside one that is stuck."""
    print(f"minitp: rank {rank} failed: {reason}", file=sys.stderr, flush=True)


def shared_counts(host):
    """int64 [ranks] that all ranks of one host see; on several hosts, [ranks] that only this rank sees."""
    path = None
    with host.agreed():
        if host.rank == 0:
            descriptor, path = tempfile.mkstemp(prefix="minitp-launches-")
            os.write(descriptor, bytes(8 * host.size))
            os.close(descriptor)
    path = host.broadcast(path)
    here = all(host.allgather_object(os.path.exists(path)))
    counts = np.memmap(path, np.int64, "r+") if here else np.full(host.size, np.iinfo(np.int64).max)
    if not here:
        counts[host.rank] = 0
    host.allgather_object(None)  # all have it open
    with host.agreed():  # before any goes on and may fail
        if host.rank == 0:
            os.unlink(path)
    return counts


def allow_shared_gpu():
    """Let several ranks use one GPU, if this NCCL can, which is so from 2.30; returns whether it can."""
    if load_nccl().get_version() < SHARES_GPUS:
        return False
    os.environ |= {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_MAX_CTAS": "1"}
    return True


def load_nccl():
    """The module `cupy.cuda.nccl`, with NCCL behind it; else RankError."""
    try:
        from cupy.cuda import nccl

        nccl.get_version()
    except (ImportError, RuntimeError, AttributeError) as error:
        raise RankError(
            f"NCCL is missing ({one_line(error)[:80]}): pip install nvidia-nccl-cu12 (or -cu13), or use "
            "--comm mpi"
        ) from error
    return nccl
