"""Collectives through NCCL, called by `cupy.cuda.nccl`, and a watchdog that ends a stuck job."""

import os
import sys
import tempfile
import threading
from collections import deque
from contextlib import contextmanager, suppress
from functools import partial
from time import monotonic

import numpy as np

from minitp.cuda.choice import choose, warn_of_failures
from minitp.cuda.comm import DeviceComm, StagedComm
from minitp.errors import RankError, one_line

PATIENCE_S = 8.0  # time limit for work on the GPU; a forward pass takes far less
START_S = 60.0  # time limit for all ranks to arrive in NCCL and for NCCL to connect their GPUs
LOOK_S = 0.25  # interval of the watchdog's checks
SHARES_GPUS = 23000  # first NCCL version, 2.30, that lets ranks share a GPU
LAST_RESORT_S = 2.0  # time for a rank to return after its communicator was aborted


class NcclComm(DeviceComm):
    """Collectives between ranks with one GPU each, through NCCL, on each rank's own stream.

    Rank 0 creates the unique id and broadcasts it through the host's Comm; if that fails, all ranks learn of
    it. NCCL rounds 16-bit sums after each addition, so they are less exact than those of `Comm`; but they
    have the same bits on all ranks.

    Parameters
    ----------
    host : Comm
    gpu : Gpu
    patience_s : float
        Time limit for one launch on the GPU, after which the watchdog ends the job.
    auto : bool
        Let `reserve` choose another transport if that is faster.

    Raises
    ------
    AgreedError
        on all ranks, if one of them has no NCCL or rank 0 cannot create the unique id.
    RankError
        on a rank where the communicator cannot be created. The other ranks wait for it inside NCCL until the
        job is ended.
    """

    capturable, transport = True, "nccl"

    def __init__(self, host, gpu, patience_s=PATIENCE_S, auto=False):
        super().__init__(host, gpu)
        self._auto = auto
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
        """Create this rank's communicator, which waits until all ranks create theirs."""

        def give_up():
            missing = [rank for rank, count in enumerate(launches) if count == 0]
            report_failure(self.rank, f"NCCL did not start within {START_S:g} s: {not_arrived(missing)}")
            self.host.abort(RankError.exit_code)

        launches[self.rank] = 1
        timer = threading.Timer(START_S, give_up)
        timer.daemon = True
        timer.start()
        try:
            return self._nccl.NcclCommunicator(self.size, unique_id, self.rank)
        except RuntimeError as error:  # NcclError
            raise RankError(f"NCCL failed to start: {one_line(error)}") from error
        finally:
            timer.cancel()

    def reserve(self, compiler, width):
        return self._fastest(self.gpu.cupy.zeros((1, width), compiler.dtype), {}, {}) if self._auto else self

    def _fastest(self, x, candidates, failed):
        """Time all-reduces of x [1, D] over `candidates`, NCCL and the hosts; return the Comm to use."""
        staged = StagedComm(self.host, self.gpu)
        candidates["nccl"] = self, partial(NcclComm.reduce_into, self)
        candidates[staged.transport] = staged, staged.reduce_into
        self.choice = staged.choice = choose(self.host, self.gpu, candidates, x, failed)
        warn_of_failures(self.host, self.choice)
        return staged if self.choice.name == staged.transport else self

    def reduce_into(self, x, out):
        kind, add = self._types[x.dtype.name], self._nccl.NCCL_SUM
        with self._named_errors("all-reduce"):
            self._communicator.allReduce(x.data.ptr, out.data.ptr, x.size, kind, add, self.gpu.stream.ptr)

    def gather_into(self, x, out):
        kind = self._types[x.dtype.name]
        with self._named_errors("all-gather"):
            self._communicator.allGather(x.data.ptr, out.data.ptr, x.size, kind, self.gpu.stream.ptr)

    def check(self):
        self._watchdog.check()

    def launching(self):
        return self._watchdog.launching()

    def close(self):
        """Destroy the communicator, and then close the host's Comm, which must outlive it."""
        self._watchdog.stop()
        self.gpu.stream.synchronize()
        self._communicator.destroy()
        self.host.close()

    def abort(self, exit_code):
        """Abort the communicator, whose kernels would keep the process alive, and then the job."""
        if self._watchdog is not None:
            self._watchdog.stop()
            with suppress(RuntimeError):
                self._communicator.abort()
        self.host.abort(exit_code)

    @contextmanager
    def _named_errors(self, what):
        try:
            yield
        except RuntimeError as error:  # NcclError
            self.check()
            raise RankError(f"NCCL's {what} failed: {one_line(error)}") from error


class Watchdog:
    """A thread that aborts the communicator if the GPU does not finish a launch in time.

    At each launch the rank increments its counter, in memory that the ranks of a host share, and afterwards
    records an event on the stream. So a waiting rank can name the ranks that have not arrived.
    """

    def __init__(self, communicator, gpu, host, launches, patience_s):
        self._communicator, self._gpu, self._host, self._patience = communicator, gpu, host, patience_s
        self._events, self._entered = deque(), None  # (time, event) of unfinished launches
        self._error, self._stopped = None, threading.Event()
        self._launches = launches  # the count of each rank, if this rank can see it
        self._thread = threading.Thread(target=self._watch, name="NCCL watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def launching(self):
        """Watch the work launched in a `with` block, including collectives, until the GPU has finished it."""
        self.check()
        self._launches[self._host.rank] += 1
        self._entered = monotonic()
        try:
            yield
        except RuntimeError as error:  # from CUDA or NCCL; if the watchdog aborted, it knows the reason
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
        """Stop watching."""
        self._stopped.set()

    def _watch(self):
        while not self._stopped.wait(LOOK_S):
            while self._events and self._events[0][1].done:
                self._events.popleft()
            reason = self._problem()
            if reason is not None:
                self._end(reason)
                return

    def _problem(self):
        """Return why the communicator must be aborted, or None."""
        try:
            self._communicator.check_async_error()
        except RuntimeError as error:  # NcclError
            return f"NCCL: {one_line(error)}"
        oldest = self._events[0][0] if self._events else self._entered
        if oldest is None or monotonic() - oldest < self._patience:
            return None
        own = self._launches[self._host.rank]
        late = [rank for rank, count in enumerate(self._launches) if count < own]
        return f"stuck in a collective for {self._patience:g} s: {not_arrived(late)}"

    def _end(self, reason):
        self._error = RankError(reason)
        with suppress(RuntimeError):
            self._communicator.abort()
        if not self._stopped.wait(LAST_RESORT_S):  # else the rank's own thread woke up and is ending the job
            report_failure(self._host.rank, reason)
            self._host.abort(RankError.exit_code)


def not_arrived(ranks):
    """Return the part of a message that names the ranks that did not arrive."""
    if not ranks:
        return "no rank is known to be missing"
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} did not arrive"


def report_failure(rank, reason):
    """Print why the job ends, because the thread that is stuck cannot."""
    print(f"minitp: rank {rank} failed: {reason}", file=sys.stderr, flush=True)


def shared_counts(host):
    """Return launch counters, int64 [ranks], shared by all ranks if they are on one host, else private."""
    path = None
    with host.agreed():
        if host.rank == 0:
            descriptor, path = tempfile.mkstemp(prefix="minitp-launches-")
            os.write(descriptor, bytes(8 * host.size))
            os.close(descriptor)
    path = host.broadcast(path)
    one_host = all(host.allgather_object(os.path.exists(path)))
    counts = np.memmap(path, np.int64, "r+") if one_host else np.full(host.size, np.iinfo(np.int64).max)
    if not one_host:
        counts[host.rank] = 0
    host.allgather_object(None)  # every rank has opened the file
    with host.agreed():  # delete it before any rank continues and may fail
        if host.rank == 0:
            os.unlink(path)
    return counts


def allow_shared_gpu():
    """Let several ranks use one GPU if this NCCL supports it (2.30 or newer); return whether it does."""
    if load_nccl().get_version() < SHARES_GPUS:
        return False
    os.environ |= {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_MAX_CTAS": "1"}
    return True


def load_nccl():
    """Import `cupy.cuda.nccl` and return it; raise RankError if the NCCL library is missing."""
    try:
        from cupy.cuda import nccl

        nccl.get_version()
    except (ImportError, RuntimeError, AttributeError) as error:
        raise RankError(
            f"NCCL is missing ({one_line(error)[:80]}): pip install nvidia-nccl-cu12 (or -cu13), or use "
            "--comm mpi"
        ) from error
    return nccl
