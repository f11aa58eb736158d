"""Ranks that serve requests, as their caller sees them; what is said to them is in `service`.

StartedRanks   processes of their own, started and watched from here (a plain script, a notebook, a server)
JoinedRanks    the ranks of the mpirun in which this process is rank 0; the step runs in a thread of it
"""

import itertools
import json
import os
import queue
import threading
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

from minitp.errors import InputError, MinitpError, RankError
from minitp.launch.run import WORKER
from minitp.launch.supervisor import rank_processes

CLOSE_LIMIT_S = 10  # for ranks to leave by themselves
JOINED = "MINITP_JOINED"  # in the environment of a process that has joined the ranks of its mpirun


@dataclass
class Update:
    """What is new of a request.

    Attributes
    ----------
    token_ids : list of int
    text : str
    logprobs : list
        See request.Request.
    finish_reason : str or None
        Of its last update: as of request.Request, or "error".
    error : MinitpError or None
        Why it could not be taken, or came to no end.
    """

    token_ids: list = field(default_factory=list)
    text: str = ""
    logprobs: list = field(default_factory=list)
    finish_reason: str | None = None
    error: MinitpError | None = None


class Ranks:
    """Takes requests to rank 0, and to each listener what comes of its own.

    Listeners and callbacks are called in a thread of this object, one after another: they must not wait.

    Parameters
    ----------
    on_loading : callable
        Gets (bytes of rank 0's weights loaded, all of them) while they are.
    on_end : callable
        Called with the MinitpError that ended the ranks, unless they were told to end.

    Attributes
    ----------
    description : dict or None
        What the ranks can take, once they are ready; see engine.run.
    load : dict
        How busy they are; see Scheduler.load.
    error : MinitpError or None
        What ended them.
    """

    def __init__(self, on_loading=lambda done, total: None, on_end=lambda error: None):
        self.on_loading, self.on_end = on_loading, on_end
        self.description, self.load, self.error = None, {}, None
        self.started = threading.Event()  # ready, or at an end
        self.closing = False
        self._numbers, self._listeners, self._lock = itertools.count(), {}, threading.Lock()
        self._failure = None  # why all ranks are leaving

    def add(self, prompt_ids, params, listener):
        """Send a request; `listener` gets its Updates. Returns the number by which to `drop` it."""
        with self._lock:
            if self.error is not None:
                raise self.error
            number = next(self._numbers)
            self._listeners[number] = listener
        self._tell({"add": number, "prompt_ids": prompt_ids, "params": asdict(params)})
        return number

    def drop(self, number):
        """Nobody wants this request any more: its listener is forgotten, and its blocks are free at once."""
        with self._lock:
            wanted = self._listeners.pop(number, None) is not None
        if wanted and self.error is None:
            self._tell({"drop": number})

    def close(self):
        """The ranks leave; returns when they have. Requests that are not done get a RankError."""
        raise NotImplementedError

    def _tell(self, message):
        raise NotImplementedError

    def _hear(self, message):
        """Rank 0 has said something."""
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
            for number, update in message["updates"]:
                self._hand_on(number, update)

    def _hand_on(self, number, update):
        if "error" in update:
            update = Update(finish_reason="error", error=InputError(update["error"]))
        else:
            update = Update(**update)
            update.logprobs = [(logprob, list(map(tuple, top))) for logprob, top in update.logprobs]
        with self._lock:
            listener = self._listeners.get(number)
            if update.finish_reason is not None:
                self._listeners.pop(number, None)
        if listener is not None:  # else it was dropped meanwhile
            listener(update)

    def _ended(self, code, words=()):
        """There are no ranks any more: why, if none has said it, their exit code tells."""
        error = RankError(f"the ranks have left with code {code}", words) if code else None
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
    """Ranks as processes of their own.

    Parameters
    ----------
    options : EngineOptions
    size : int
        The number of ranks.
    worker : list of str
        The command of a rank.
    callbacks
        As of Ranks.

    Raises
    ------
    RankError
        if they cannot be started
    """

    def __init__(self, options, size, worker=WORKER, **callbacks):
        super().__init__(**callbacks)
        with ExitStack() as stack:
            self._job = stack.enter_context(rank_processes(size, options.verbose))
            self._job.on_message = self._hear
            self._job.start([*worker, "ranks", json.dumps(asdict(options))])
            self._stack = stack.pop_all()
        self._thread = threading.Thread(target=self._watch, name="minitp: watches the ranks", daemon=True)
        self._thread.start()

    def _watch(self):
        with self._stack:
            try:
                code = self._job.watch()
            except RankError as failure:
                self._failure, code = failure, failure.exit_code
            self._ended(code, self._job.words_of("rank0"))

    def _tell(self, message):
        self._job.tell(message)

    def close(self):
        """As Ranks.close; those that do not leave by themselves are ended."""
        self.closing = True
        if threading.current_thread() is self._thread:  # in which a caller's LLM may be collected
            self._job.given_up = True
            return
        try:
            if self.started.is_set() and self.error is None:
                self._job.tell({"close": True})
                self._thread.join(CLOSE_LIMIT_S)
        finally:  # also when Ctrl-C cuts the waiting short
            self._job.given_up = True
            self._thread.join()


class JoinedRanks(Ranks):
    """The ranks of an mpirun, in rank 0 of it; the others are in `launch.rank.run_in_world`.

    If one fails it ends all of them, this process too, as MPI does.

    Parameters
    ----------
    options : EngineOptions
    world : int
        The number of ranks.
    callbacks
        As of Ranks.
    """

    def __init__(self, options, world, **callbacks):
        super().__init__(**callbacks)
        if JOINED in os.environ:
            raise InputError("under mpirun a script has one LLM: the other ranks have left with the first")
        os.environ[JOINED] = "1"
        self.inbox = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(options, world), daemon=True)
        self._thread.start()

    def _run(self, options, world):
        self._ended(join_world(options, world, caller=self))

    def say(self, message):
        """What rank 0's step says, to those who listen here."""
        self._hear(message)

    def _tell(self, message):
        self.inbox.put(message)

    def close(self):
        """As Ranks.close."""
        self.closing = True
        self.inbox.put({"close": True})
        self._thread.join()


def join_world(options, world, caller=None):
    """Be one of the ranks that mpirun has started, of `world`; returns the exit code when they are through.

    `caller` is whom rank 0 serves, if it was not started by the launcher.
    """
    from minitp.launch.rank import run_in_world

    return run_in_world(work_of(options), options, world, caller, serving=True)


def run_alone_for_caller(options):
    """Be the only rank, which needs no MPI; returns the exit code."""
    from minitp.comm.single import SingleRank
    from minitp.launch.rank import run_alone

    return run_alone(work_of(options), options, SingleRank(), serving=True)


def work_of(options):
    """Return the work of such a rank for `launch.rank`; NumPy is imported when MPI is there."""

    def work(comm, caller):
        from minitp.engine.run import run_engine

        return run_engine(options, comm, caller)

    return work
