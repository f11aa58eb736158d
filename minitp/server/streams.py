"""Responses on their way to the client: as a stream of events, or collected and sent as a whole."""

import asyncio
import time
from contextlib import contextmanager

from starlette.responses import StreamingResponse

from minitp.server.errors import ApiError
from minitp.server.responses import event


class EventStream(StreamingResponse):
    """A response as server-sent events, which stops unfinished sequences however the stream ends."""

    def __init__(self, running, response, timer):
        super().__init__(self.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.running, self.response, self.timer, self.status = running, response, timer, 499

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.running.stop()
            self.timer.finish(self.status, self.response)

    async def events(self):
        """Yield the events; after an error, the last event is its error object."""
        for chunk in self.response.first_chunks():
            yield event(chunk)
        try:
            async for index, update in self.running:
                self.timer.record(update)
                for chunk in self.response.chunks(index, update):
                    yield event(chunk)
        except ApiError as error:
            self.status = error.status
            yield event(error.object())
            return
        for chunk in self.response.last_chunks():
            yield event(chunk)
        self.status = 200
        yield event("[DONE]")


class RequestTimer:
    """A timer that records one request in the metrics."""

    def __init__(self, metrics, route):
        self.metrics, self.route = metrics, route
        self.started, self.first = time.perf_counter(), None

    def record(self, update):
        """Record the time of the first token when its Update arrives."""
        if self.first is None and update.token_ids:
            self.first = time.perf_counter()
            self.metrics.first_token.observe(self.first - self.started)

    @contextmanager
    def finishing(self, status, response=None):
        """Record the end of a `with` block: 200, the status of its ApiError, or else `status`."""
        try:
            yield
            status = 200
        except ApiError as error:
            status = error.status
            raise
        finally:
            self.finish(status, response)

    def finish(self, status, response=None):
        """Record the end of the request, with its response if it was accepted."""
        now = time.perf_counter()
        self.metrics.requests.labels(self.route, str(status)).inc()
        self.metrics.seconds.labels(self.route).observe(now - self.started)
        if response is None:
            return
        usage = response.usage()
        self.metrics.prompt_tokens.inc(usage["prompt_tokens"])
        self.metrics.new_tokens.inc(usage["completion_tokens"])
        longest = max(choice.tokens for choice in response.choices)
        if longest > 1 and self.first is not None:
            self.metrics.each_token.observe((now - self.first) / (longest - 1))


async def collect(running, response, timer):
    """Add all output of a running request to the response."""
    async for index, update in running:
        timer.record(update)
        response.add(index, update)


async def cancel_on_disconnect(request, work):
    """Await `work`; if the client disconnects before it is done, cancel it and raise ApiError 499."""
    task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(wait_for_disconnect(request))
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has disconnected")
        await task
    finally:
        task.cancel()
        disconnect.cancel()


async def wait_for_disconnect(request):
    """Wait until the client disconnects; the request's body must have been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
