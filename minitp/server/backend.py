"""The model behind the server: it comes up, is there, or has gone; and who may ask it how much."""

import asyncio
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from minitp.engine.client import Update
from minitp.errors import MinitpError, RankError
from minitp.server.requests import ApiError

RETRY_AFTER = {"Retry-After": "5"}  # seconds


@dataclass(frozen=True)
class AdmissionLimits:
    """What clients may take.

    Attributes
    ----------
    sequences : int
        Continuations on their way, running or waiting, of all clients.
    seconds : float
        For an answer.
    """

    sequences: int
    seconds: float


class Backend:
    """An LLM as the server sees it.

    Parameters
    ----------
    start : callable
        Makes the LLM, in minutes perhaps: start(on_end).
    limits : AdmissionLimits
    restart : bool
        Start it anew when its ranks have died.

    Attributes
    ----------
    state : str
        "loading", "ready", "draining" (no new requests) or "failed".
    """

    def __init__(self, start, limits, restart=False):
        self._start, self.limits, self._restart = start, limits, restart
        self.state, self.llm = "loading", None
        self.restarts = 0
        self.running = set()  # Running, of all requests

    async def run(self):
        """Keep an LLM running; returns the MinitpError when there is none and will be none."""
        loop = asyncio.get_running_loop()
        while True:
            ended = loop.create_future()

            def on_end(error, ended=ended):
                with suppress(RuntimeError):  # of a loop that has ended
                    loop.call_soon_threadsafe(ended.set_result, error)

            try:
                self.llm = await in_thread(lambda on_end=on_end: self._start(on_end))
                if self.state == "loading":
                    self.state = "ready"
                error = await ended
            except MinitpError as failure:
                self.state = "failed"
                return failure
            if not self._restart or self.state == "draining":
                self.state = "failed"
                return error
            print(f"minitp: {error}", file=sys.stderr)
            self.state = "loading"
            self.restarts += 1
            await in_thread(self.llm.close)

    def ready(self):
        """The LLM; ApiError 503 if it can take nothing now."""
        if self.state != "ready":
            words = {
                "loading": "the model is loading",
                "draining": "the server is shutting down",
                "failed": "a rank has died; the server is ending",
            }
            raise ApiError(503, words[self.state], code=self.state, headers=RETRY_AFTER)
        return self.llm

    def submit(self, sequences):
        """Send (prompt_ids, SamplingParams) each; the Running of them.

        Raises
        ------
        ApiError
            429 if too many are on their way, 400 if there are more of them than ever may be
        """
        llm, count, most = self.ready(), len(sequences), self.limits.sequences
        if count > most:
            raise ApiError(
                400, f"{count} continuations in one request; this server takes {most} at a time", "n"
            )
        already = sum(running.count for running in self.running)
        if already + count > most:
            raise ApiError(
                429,
                f"the queue is full: {already} continuations are on their way, of at most {most}",
                code="queue_full",
                headers=RETRY_AFTER,
            )
        return Running(self, llm, sequences)

    def give_up(self):
        """End all requests that are not done, with an error."""
        for running in self.running:
            running.put(0, Update(finish_reason="error", error=RankError("the server is shutting down")))


class Running:
    """Sequences on their way: an iterator over (index, Update). Whoever made it calls `stop` in the end."""

    def __init__(self, backend, llm, sequences):
        self._backend, self._left, self.count = backend, len(sequences), len(sequences)
        self._loop, self._updates, self._stops = asyncio.get_running_loop(), asyncio.Queue(), []
        self._until = self._loop.time() + backend.limits.seconds
        backend.running.add(self)
        try:
            for index, (ids, params) in enumerate(sequences):
                self._stops.append(llm.submit(ids, params, partial(self.put, index)))
        except MinitpError as error:
            self.stop()
            raise ApiError(503, told(error), code="failed", headers=RETRY_AFTER) from error

    def put(self, index, update):
        """Something has come of a sequence; any thread may say so."""
        with suppress(RuntimeError):  # of a loop that has ended
            self._loop.call_soon_threadsafe(self._updates.put_nowait, (index, update))

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self._left:
            raise StopAsyncIteration
        try:
            index, update = await asyncio.wait_for(self._updates.get(), self._until - self._loop.time())
        except asyncio.TimeoutError:
            raise ApiError(
                504, f"not done within {self._backend.limits.seconds:g} s", code="timeout"
            ) from None
        if update.error is not None:
            raise ApiError(500, told(update.error), code="failed")
        if update.finish_reason is not None:
            self._left -= 1
        return index, update

    def stop(self):
        """What is not done yet is dropped, and its blocks are free within a step."""
        self._backend.running.discard(self)
        for stop in self._stops:
            stop()
        self._stops = []


def told(error):
    """What a client is told of an error; the last words of a rank are not for it."""
    return getattr(error, "message", str(error))


async def in_thread(function):
    """function() in a thread that ends with the process, whatever it waits for."""
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
        with suppress(RuntimeError):  # of a loop that has ended
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=run, daemon=True).start()
    return await result
