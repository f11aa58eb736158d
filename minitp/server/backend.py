"""The server's model: its state (loading, ready, draining, failed), its requests and their limits."""

import asyncio
import gc
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from minitp.engine.ranks import Update
from minitp.errors import MinitpError, RankError
from minitp.server.errors import ApiError
from minitp.util.format import counted

RETRY_AFTER = {"Retry-After": "5"}  # seconds
DRAIN_CHECK_S = 0.05
RETRY_S = 10  # time between a restart of a replica that has failed and the next one
TIMEOUT = None, None  # an item in a request's queue: its time is over


@dataclass(frozen=True)
class AdmissionLimits:
    """The limits on clients' requests.

    Attributes
    ----------
    sequences : int
        The maximum number of sequences that run or wait at the same time, over all clients.
    seconds : float
        The time limit of a response.
    """

    sequences: int
    seconds: float


class Backend:
    """The LLM of a server, with its state and its unfinished requests.

    Parameters
    ----------
    start : callable
        start(on_end) -> LLM. It may take minutes.
    ready_line : callable
        ready_line(llm) -> the line to print once the LLM accepts requests.
    limits : AdmissionLimits
    restart : bool
        Start the ranks, or those of one replica, again if one dies.

    Attributes
    ----------
    state : str
        "loading", "ready", "draining" (no new requests) or "failed".
    """

    def __init__(self, start, ready_line, limits, restart=False):
        self._start, self._ready_line, self.limits, self._restart = start, ready_line, limits, restart
        self.state, self.llm = "loading", None
        self.restarts = 0
        self.running = set()  # the RunningRequest of each unfinished request

    async def run(self):
        """Keep an LLM running; return the MinitpError that ended it for good."""
        loop = asyncio.get_running_loop()
        while True:
            ended = asyncio.Queue()

            def on_end(error, ended=ended):
                with suppress(RuntimeError):  # if the loop has ended
                    loop.call_soon_threadsafe(ended.put_nowait, error)

            try:
                self.llm = await in_thread(lambda on_end=on_end: self._start(on_end))
                gc.freeze()  # what has been loaded stays, and the garbage collector need not look at it again
                if self.state == "loading":
                    self.state = "ready"
                    log(self._ready_line(self.llm))
                error = await self._last_end(ended)
            except MinitpError as failure:
                self.state = "failed"
                return failure
            if not self._restart or self.state == "draining":
                self.state = "failed"
                return error
            log(error)
            self.state = "loading"
            self.restarts += 1
            await in_thread(self.llm.close)

    async def _last_end(self, ended):
        """Return the error that ended the last replica, and start others again in the meantime."""
        restarts = set()
        while True:
            error = await ended.get()
            if self.llm.error is not None:
                return error
            log(error)
            replicas = self.llm.replicas
            log(f"replicas that accept requests: {sum(one['ready'] for one in replicas)} of {len(replicas)}")
            if self._restart and self.state == "ready":
                restarts.add(asyncio.ensure_future(self._restart_replicas(self.llm)))

    async def _restart_replicas(self, llm):
        """Start the replicas that have ended again, and repeat this if it fails."""
        started = []
        while self.state == "ready" and llm.error is None:  # otherwise `run` reports the end of all
            try:
                started = await in_thread(llm.restart)
                break
            except MinitpError as error:
                if self.state == "ready" and llm.error is None:
                    log(error)
                    log(f"restarting again in {RETRY_S} s")
                    await asyncio.sleep(RETRY_S)
        self.restarts += len(started)
        for replica in started:
            log(f"restarted: replica {replica}")

    def ready(self):
        """Return the LLM; raise ApiError 503 if it does not accept requests now."""
        if self.state != "ready":
            messages = {
                "loading": "the model is loading",
                "draining": "the server is shutting down",
                "failed": "the model has failed; the server is shutting down",
            }
            raise ApiError(503, messages[self.state], code=self.state, headers=RETRY_AFTER)
        return self.llm

    def replicas(self):
        """Return the state of each replica, as LLM.replicas does; [] if there is one, or no LLM."""
        return [] if self.llm is None else self.llm.replicas

    def check_room(self, count):
        """Raise ApiError 400 if a request may not have `count` sequences, 429 if there is no room now."""
        limit = self.limits.sequences
        if count > limit:
            raise ApiError(
                400,
                f"the request asks for {counted(count, 'sequence')}; this server allows {limit} at a time",
                "n",
            )
        unfinished = sum(running.count for running in self.running)
        if unfinished + count > limit:
            raise ApiError(
                429,
                f"the queue is full: {unfinished} of at most {counted(limit, 'sequence')} are running or "
                "waiting",
                code="queue_full",
                headers=RETRY_AFTER,
            )

    async def submit(self, sequences):
        """Send the sequences, (prompt_ids, SamplingParams) each, to the LLM; return their RunningRequest.

        Raises
        ------
        ApiError
            as `ready` and `check_room` do.
        """
        llm = self.ready()
        self.check_room(len(sequences))
        running = RunningRequest(self, len(sequences))
        try:
            await in_thread(lambda: running.start(llm, sequences))
        except BaseException:
            running.stop()
            raise
        return running

    async def drain(self, seconds):
        """Accept no more requests, wait until all have finished, and end those that remain with an error."""
        self.state, end = "draining", time.monotonic() + seconds
        while self.running and time.monotonic() < end:
            await asyncio.sleep(DRAIN_CHECK_S)
        for running in self.running:
            running.put(0, Update(finish_reason="error", error=RankError("the server is shutting down")))


class RunningRequest:
    """An asynchronous iterator over (index, Update) of a request's sequences; call `stop` at the end."""

    def __init__(self, backend, count):
        self._backend, self._unfinished, self.count = backend, count, count
        self._loop, self._updates, self._stops = asyncio.get_running_loop(), asyncio.Queue(), []
        # One timer per request: asyncio.wait_for would create a timer and a future for each token.
        self._timer = self._loop.call_later(backend.limits.seconds, self._updates.put_nowait, TIMEOUT)
        backend.running.add(self)

    def start(self, llm, sequences):
        """Send the sequences to the LLM, those of each prompt together.

        With many long prompts, this takes a second.
        """
        try:
            for _, group in groupby(enumerate(sequences), lambda numbered: id(numbered[1][0])):
                group = list(group)
                requests = [(params, partial(self.put, index)) for index, (_, params) in group]
                self._stops += llm.submit_all(group[0][1][0], requests)
        except MinitpError as error:
            raise ApiError(503, client_message(error), code="failed", headers=RETRY_AFTER) from error

    def put(self, index, update):
        """Queue an Update of a sequence, from any thread."""
        with suppress(RuntimeError):  # if the loop has ended
            self._loop.call_soon_threadsafe(self._updates.put_nowait, (index, update))

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self._unfinished:
            raise StopAsyncIteration
        index, update = await self._updates.get()
        if index is None:
            limit = self._backend.limits.seconds
            raise ApiError(504, f"the response was not finished within {limit:g} s", code="timeout")
        if update.error is not None:
            raise ApiError(500, client_message(update.error), code="failed")
        if update.finish_reason is not None:
            self._unfinished -= 1
        return index, update

    def stop(self):
        """Stop all unfinished sequences; their blocks are free after the current batch."""
        self._backend.running.discard(self)
        self._timer.cancel()
        for stop in self._stops:
            stop()
        self._stops = []


def log(text):
    """Print a line on stderr, unless nothing reads it any more."""
    with suppress(OSError):
        print(f"minitp: {text}", file=sys.stderr, flush=True)


def client_message(error):
    """Return an error's message for clients, without the last output of a rank."""
    return getattr(error, "message", str(error))


async def in_thread(function):
    """Run function() in a daemon thread, which cannot delay the end of the process; return its result."""
    loop, result = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

    def settle(value, error):
        if not result.done():
            result.set_result(value) if error is None else result.set_exception(error)

    def run():
        value = error = None
        try:
            value = function()
        except Exception as failure:
            error = failure
        with suppress(RuntimeError):  # if the loop has ended
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=run, daemon=True).start()
    return await result
