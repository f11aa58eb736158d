"""Ranks that serve requests, as their caller sees them; the module `service` lists the messages.

StartedRanks   ranks that this process starts and watches (for a plain script, a notebook, a server)
JoinedRanks    the ranks of an mpirun in which this process is rank 0, whose work runs in a thread
"""

import json
import os
import queue
import threading
from contextlib import ExitStack
from dataclasses import asdict

from minitp.engine.ranks import Ranks
from minitp.errors import InputError, RankError, one_line
from minitp.launch.run import WORKER
from minitp.launch.supervisor import rank_processes

CLOSE_LIMIT_S = 10  # time for ranks to exit after "close"
JOINED = "MINITP_JOINED"  # set in the environment of a process that has joined the ranks of its mpirun


class StartedRanks(Ranks):
    """Ranks that this process starts as child processes.

    Parameters
    ----------
    options : EngineOptions
    size : int
        The number of ranks.
    worker : list of str
        The command that each rank runs.
    replica : (int, int)
        The index and the number of the replicas that this process starts.
    callbacks
        The same as for Ranks.

    Raises
    ------
    RankError
        if the ranks cannot be started.
    """

    def __init__(self, options, size, worker=WORKER, replica=(0, 1), **callbacks):
        super().__init__(**callbacks)
        with ExitStack() as stack:
            self._job = stack.enter_context(rank_processes(size, options.verbose, replica=replica))
            self._job.on_message = self._receive
            self._job.start([*worker, "ranks", json.dumps(asdict(options))])
            self._stack = stack.pop_all()
        self._thread = threading.Thread(target=self._watch, name="minitp: watches the ranks", daemon=True)
        self._thread.start()

    def _watch(self):
        code, output = RankError.exit_code, []
        try:
            with self._stack:  # ends the processes, so that ranks started again find their memory free
                try:
                    code = self._job.watch()
                finally:
                    output = self._job.output_of("rank0")
        except RankError as failure:
            self._failure = failure
        except Exception as error:  # of a callback, or in a message; callers must not wait forever
            self._failure = RankError(f"the supervisor failed: {one_line(error)}")
        self._record_end(code, output)

    def _send(self, message):
        self._job.send(message)

    def close(self):
        """End the ranks as Ranks.close does, and kill those that do not exit by themselves."""
        if self.forked:
            return
        self.closing = True
        if threading.current_thread() is self._thread:  # an LLM may be garbage-collected in this thread
            self._job.cancelled = True
            return
        try:
            if self.started.is_set() and self.error is None:
                self._job.send({"close": True})
                self._thread.join(CLOSE_LIMIT_S)
        finally:  # also if Ctrl-C interrupts the wait
            self._job.cancelled = True
            self._thread.join()

    def kill(self):
        self.closing = self._job.cancelled = True


class JoinedRanks(Ranks):
    """The ranks of an mpirun whose rank 0 is this process; the other ranks run `join_world`.

    If one rank fails, MPI ends all of them, including this process.

    Parameters
    ----------
    options : EngineOptions
    world : int
        The number of ranks.
    others : list of leaders.RemoteRanks
        The other replica groups of the world.
    callbacks
        The same as for Ranks.
    """

    def __init__(self, options, world, others=(), **callbacks):
        super().__init__(**callbacks)
        self.others = others
        if JOINED in os.environ:
            raise InputError(
                "a script under mpirun can start only one LLM, because the other ranks exit with the first; "
                "run the script without mpirun to start several"
            )
        os.environ[JOINED] = "1"
        self.inbox = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(options, world), daemon=True)
        self._thread.start()

    def _run(self, options, world):
        code = join_world(options, world, caller=self)
        self._record_end(code)
        for other in self.others:  # they have ended already, unless the world has not started
            other.end(code)

    def send(self, message):
        """Handle a message that rank 0's work sends to its caller, which is this object."""
        self._receive(message)

    def _send(self, message):
        self.inbox.put(message)

    def close(self):
        """End the ranks and wait for them, as Ranks.close does."""
        if self.forked:
            return
        self.closing = True
        self.inbox.put({"close": True})
        self._thread.join()


def join_world(options, world, caller=None):
    """Run one of the `world` ranks that mpirun has started; return the exit code when they have finished.

    `caller` is the object that rank 0 serves if the launcher has not started the ranks.
    """
    from minitp.launch.rank import run_in_world

    return run_in_world(work_of(options), options, world, caller, serving=True)


def run_alone_for_caller(options):
    """Run the only rank, without MPI; return the exit code."""
    from minitp.comm.single import SingleRank
    from minitp.launch.rank import run_alone

    return run_alone(work_of(options), options, SingleRank(), serving=True)


def work_of(options):
    """Return the function that a serving rank runs; it imports NumPy only after MPI has started."""

    def work(comm, caller):
        from minitp.engine.leaders import connected
        from minitp.engine.run import run_engine

        with connected(comm, caller) as connected_caller:
            return run_engine(options, comm, connected_caller)

    return work
