"""Ranks that serve requests, as their caller sees them; the module `service` lists the messages.

StartedRanks   ranks that this process starts and watches (for a plain script, a notebook, a server)
JoinedRanks    the ranks of an mpirun in which this process is rank 0, whose work runs in a thread
"""

import itertools
import json
import os
import queue
import threading
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

from minitp.errors import InputError, MinitpError, RankError, one_line
from minitp.launch.run import WORKER
from minitp.launch.supervisor import rank_processes

CLOSE_LIMIT_S = 10  # time for ranks to exit after "close"
JOINED = "MINITP_JOINED"  # set in the environment of a process that has joined the ranks of its mpirun


@dataclass
class Update:
    """The new output of a request.

    Attributes
    ----------
    token_ids, text, logprobs, prompt_logprobs
        The same as for request.Request, but only the new part.
    cached_tokens : int
        The number of prompt tokens that were in the cache; see request.Request.
    finish_reason : str or None
        None until the last update; then the same as for request.Request, or "error".
    error : MinitpError or None
        The reason why the request was rejected or could not be finished.
    """

    token_ids: list = field(default_factory=list)
    text: str = ""
    logprobs: list = field(default_factory=list)
    prompt_logprobs: list = field(default_factory=list)
    cached_tokens: int = 0
    finish_reason: str | None = None
    error: MinitpError | None = None


class Ranks:
    """A caller's handle on ranks: it sends requests to rank 0 and delivers their output to listeners.

    Listeners and callbacks are called one after another in a thread of this object, so they must not block.

    Parameters
    ----------
    on_loading : callable
        on_loading(done, total) is called with numbers of bytes while rank 0 loads its weights.
    on_end : callable
        on_end(error) is called with the MinitpError that ended the ranks, unless `close` ended them.

    Attributes
    ----------
    description : dict or None
        The settings and sizes of the ranks, once they are ready; see engine.run.describe.
    load : dict
        The current load; see Scheduler.load.
    rank_times : list of dict
        The times of each rank; see service.RankTimes.
    error : MinitpError or None
        The reason why the ranks have ended.
    """

    def __init__(self, on_loading=lambda done, total: None, on_end=lambda error: None):
        self.on_loading, self.on_end = on_loading, on_end
        self.description, self.load, self.rank_times, self.error = None, {}, [], None
        self.started = threading.Event()  # set when the ranks are ready or have ended
        self.closing = False
        self._numbers, self._listeners, self._lock = itertools.count(), {}, threading.Lock()
        self._failure = None  # the reason why all ranks are exiting, once one is known
        self._owner = os.getpid()

    @property
    def forked(self):
        """True in a forked child of the process that owns the ranks, which must leave them alone."""
        return os.getpid() != self._owner

    def add(self, prompt_ids, params, listener):
        """Send a request, whose Updates go to `listener`; return its number, for `abort`."""
        if self.forked:
            raise InputError(
                f"this process was forked from process {self._owner}, and only that one can use its LLM; "
                "create another LLM here"
            )
        with self._lock:
            if self.error is not None:
                raise self.error
            number = next(self._numbers)
            self._listeners[number] = listener
        self._send({"add": number, "prompt_ids": prompt_ids, "params": asdict(params)})
        return number

    def abort(self, number):
        """Stop a request and free its blocks, without another Update; ignore a finished request."""
        if self.forked:
            return
        with self._lock:
            unfinished = self._listeners.pop(number, None) is not None
        if unfinished and self.error is None:
            self._send({"abort": number})

    def close(self):
        """End the ranks and wait until they have exited; unfinished requests get a RankError."""
        raise NotImplementedError

    def kill(self):
        """Let `close`, which may be waiting in another thread, kill the ranks; ignored under mpirun."""

    def _send(self, message):
        raise NotImplementedError

    def _receive(self, message):
        """Handle a message from rank 0."""
        if "loading" in message:
            self.on_loading(message["loading"], message["of"])
        elif "failed" in message:
            kind = InputError if message["exit_code"] == InputError.exit_code else RankError
            self._failure = kind(message["failed"])
        elif "ready" in message:
            self.description, self.load = message["ready"], message["load"]
            self.started.set()
        else:
            self.load = message.get("load", self.load)
            self.rank_times = message.get("rank_times", self.rank_times)
            for number, update in message["updates"]:
                self._deliver(number, update)

    def _deliver(self, number, update):
        if "error" in update:
            update = Update(finish_reason="error", error=InputError(update["error"]))
        else:
            update = Update(**update)
            for logprobs in (update.logprobs, update.prompt_logprobs):
                logprobs[:] = [one and (one[0], list(map(tuple, one[1]))) for one in logprobs]
        with self._lock:
            listener = self._listeners.get(number)
            if update.finish_reason is not None:
                self._listeners.pop(number, None)
        if listener is not None:  # else the request was aborted in the meantime
            listener(update)

    def _record_end(self, code, output=()):
        """Record why the ranks have ended, by default from their exit code, and notify all listeners."""
        error = RankError(f"the ranks exited with code {code}", output) if code else None
        with self._lock:
            self.error = self._failure or error or RankError("the ranks have been closed")
            listeners = list(self._listeners.values())
            self._listeners.clear()
        for listener in listeners:
            listener(Update(finish_reason="error", error=self.error))
        self.started.set()
        if not self.closing:
            self.on_end(self.error)


class StartedRanks(Ranks):
    """Ranks that this process starts as child processes.

    Parameters
    ----------
    options : EngineOptions
    size : int
        The number of ranks.
    worker : list of str
        The command that each rank runs.
    callbacks
        The same as for Ranks.

    Raises
    ------
    RankError
        if the ranks cannot be started.
    """

    def __init__(self, options, size, worker=WORKER, **callbacks):
        super().__init__(**callbacks)
        with ExitStack() as stack:
            self._job = stack.enter_context(rank_processes(size, options.verbose))
            self._job.on_message = self._receive
            self._job.start([*worker, "ranks", json.dumps(asdict(options))])
            self._stack = stack.pop_all()
        self._thread = threading.Thread(target=self._watch, name="minitp: watches the ranks", daemon=True)
        self._thread.start()

    def _watch(self):
        with self._stack:
            code = RankError.exit_code
            try:
                code = self._job.watch()
            except RankError as failure:
                self._failure = failure
            except Exception as error:  # of a callback, or in a message; callers must not wait forever
                self._failure = RankError(f"the supervisor failed: {one_line(error)}")
            self._record_end(code, self._job.output_of("rank0"))

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
    callbacks
        The same as for Ranks.
    """

    def __init__(self, options, world, **callbacks):
        super().__init__(**callbacks)
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
        self._record_end(join_world(options, world, caller=self))

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
        from minitp.engine.run import run_engine

        return run_engine(options, comm, caller)

    return work
