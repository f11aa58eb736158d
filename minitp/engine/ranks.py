"""A caller's handle on ranks that serve requests, and the output that it gets; `service` lists the messages.

A Ranks sends requests to rank 0 of a group and delivers the updates. Its subclasses differ in where the ranks
are: `client.StartedRanks`, `client.JoinedRanks`, `leaders.RemoteRanks`; `replicas.ReplicaRanks` has several.
"""

import itertools
import os
import threading
from dataclasses import asdict, dataclass, field

from minitp.errors import InputError, MinitpError, RankError


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

    def refuse_in_child(self):
        """Raise InputError in a forked child of the process that owns the ranks."""
        if self.forked:
            raise InputError(
                f"this process was forked from process {self._owner}, and only that one can use its LLM; "
                "create another LLM here"
            )

    def add(self, prompt_ids, params, listener):
        """Send a request, whose Updates go to `listener`; return its number, for `abort`."""
        self.refuse_in_child()
        with self._lock:
            if self.error is not None:
                raise self.error
            number = next(self._numbers)
            self._listeners[number] = listener
        self._send({"add": number, "prompt_ids": prompt_ids, "params": asdict(params)})
        return number

    def add_all(self, prompt_ids, requests):
        """Send requests with the same prompt, (params, listener) each; return their numbers."""
        return [self.add(prompt_ids, *request) for request in requests]

    def wait(self):
        """Wait until the ranks are ready or have ended."""
        self.started.wait()

    def abort(self, number):
        """Stop a request and free its blocks, without another Update; ignore a finished request."""
        if self.forked:
            return
        with self._lock:
            unfinished = self._listeners.pop(number, None) is not None
        if unfinished and self.error is None:
            self._send({"abort": number})

    def begin_close(self):
        """Ask the ranks to end, without waiting for them."""
        if not self.forked:
            self.closing = True
            if self.started.is_set() and self.error is None:
                self._send({"close": True})

    def close(self):
        """End the ranks and wait until they have exited; unfinished requests get a RankError."""
        raise NotImplementedError

    def restart(self):
        """Raise InputError, because a single group of ranks is started by a new LLM; see ReplicaRanks."""
        raise InputError("only one of several replicas can be started again; create another LLM")

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
