"""The routes."""

import asyncio
import hmac
import time
from dataclasses import replace
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from minitp.errors import ContextError, InputError
from minitp.server.backend import in_thread
from minitp.server.requests import ApiError, chat_request, completion_request, read_json
from minitp.server.responses import ChatAnswer, CompletionAnswer, event

LARGEST_BODY = 8 << 20  # bytes
BODY_SECONDS = 60  # for it to arrive
PAGE = Path(__file__).with_name("page.html")


def make_app(backend, metrics, model, api_key=None):
    """The application: `model` is the name by which clients ask for it."""
    api = Api(backend, metrics, model, api_key)
    routes = [
        Route("/", lambda request: FileResponse(PAGE)),
        Route("/health", api.health),
        Route("/metrics", api.metrics_page),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.one_model),
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
    ]
    handlers = {ApiError: refusal, HTTPException: no_such_route, Exception: failure}
    return Starlette(routes=routes, exception_handlers=handlers)


class Api:
    """What is behind each route."""

    def __init__(self, backend, metrics, model, api_key):
        self.backend, self.metrics, self.model, self.api_key = backend, metrics, model, api_key
        self.created = int(time.time())

    async def health(self, request):
        """Whether requests are taken: 200, or 503."""
        state = self.backend.state
        return JSONResponse({"status": "ok" if state == "ready" else state}, 200 if state == "ready" else 503)

    async def metrics_page(self, request):
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request):
        self.check_key(request)
        return JSONResponse({"object": "list", "data": [self.about_model()]})

    async def one_model(self, request):
        self.check_key(request)
        self.check_model(request.path_params["name"])
        return JSONResponse(self.about_model())

    async def completions(self, request):
        return await self.answer(request, completion_request, CompletionAnswer)

    async def chat(self, request):
        return await self.answer(request, chat_request, ChatAnswer)

    async def answer(self, request, read, kind):
        """The answer to a request, whose body `read` reads; whole, or as a stream."""
        watch = Watch(self.metrics, request.url.path)
        try:
            self.check_key(request)
            asked = read(read_json(await whole_body(request)))
            self.check_model(asked.model)
            llm = self.backend.ready()
            prompts = await in_thread(lambda: encoded(llm, asked, self.model))
            running = self.backend.submit(sequences(llm, asked, prompts))
        except ApiError as error:
            watch.end(error.status)
            raise
        token_text = str if llm.tokenizer is None else llm.tokenizer.token_text
        answer = kind(asked, sum(map(len, prompts)), len(prompts) * asked.choices, token_text)
        if asked.stream:
            return EventStream(running, answer, watch)
        status = 499  # the client has gone
        try:
            await unless_gone(request, collect(running, answer, watch))
            status = 200
            return JSONResponse(answer.whole())
        except ApiError as error:
            status = error.status
            raise
        finally:
            running.stop()
            watch.end(status, answer)

    def check_key(self, request):
        """ApiError 401 if a key is wanted and not given."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if self.api_key is not None and not hmac.compare_digest(given, self.api_key.encode()):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    def check_model(self, name):
        """ApiError 404 if this is not the model that is served."""
        if name != self.model:
            raise ApiError(
                404, f"no model {name!r:.200} here; this is {self.model!r}", "model", "model_not_found"
            )

    def about_model(self):
        about = {"id": self.model, "object": "model", "created": self.created, "owned_by": "minitp"}
        if self.backend.llm is not None:
            about["max_model_len"] = self.backend.llm.description["context"]
        return about


class EventStream(StreamingResponse):
    """An answer as server-sent events. However it ends, what is still running is stopped."""

    def __init__(self, running, answer, watch):
        super().__init__(self.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.running, self.answer, self.watch, self.status = running, answer, watch, 499

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.running.stop()
            self.watch.end(self.status, self.answer)

    async def events(self):
        """The events, of which the last is an error object if there was one."""
        for piece in self.answer.first_pieces():
            yield event(piece)
        try:
            async for index, update in self.running:
                self.watch.note(update)
                for piece in self.answer.pieces(index, update):
                    yield event(piece)
        except ApiError as error:
            self.status = error.status
            yield event(error.object())
            return
        for piece in self.answer.last_pieces():
            yield event(piece)
        self.status = 200
        yield event("[DONE]")


class Watch:
    """Takes the times of one request, for the metrics."""

    def __init__(self, metrics, route):
        self.metrics, self.route = metrics, route
        self.started, self.first = time.perf_counter(), None

    def note(self, update):
        """Something has come of it."""
        if self.first is None and update.token_ids:
            self.first = time.perf_counter()
            self.metrics.first_token.observe(self.first - self.started)

    def end(self, status, answer=None):
        """It has ended; with the answer if it came so far."""
        now = time.perf_counter()
        self.metrics.requests.labels(self.route, str(status)).inc()
        self.metrics.seconds.labels(self.route).observe(now - self.started)
        if answer is None:
            return
        usage = answer.usage()
        self.metrics.prompt_tokens.inc(usage["prompt_tokens"])
        self.metrics.new_tokens.inc(usage["completion_tokens"])
        longest = max(choice.tokens for choice in answer.choices)
        if longest > 1 and self.first is not None:
            self.metrics.each_token.observe((now - self.first) / (longest - 1))


def encoded(llm, asked, model):
    """The token ids of each prompt of `model`, as the server calls it."""
    try:
        if asked.messages is not None:
            return [llm.encode_chat(asked.messages)]
        return [llm.encode(prompt) for prompt in asked.prompts]
    except InputError as error:
        code = "context_length_exceeded" if isinstance(error, ContextError) else None
        param = "prompt" if asked.messages is None else "messages"
        # By the name that clients know: where the model lies is not theirs to read.
        message = str(error).replace(str(llm.source.name), model)
        raise ApiError(400, message, param, code) from error


def sequences(llm, asked, prompts):
    """(prompt_ids, SamplingParams) of each choice, prompt after prompt."""
    found, context = [], llm.description["context"]
    for ids in prompts:
        room = context - len(ids)
        if asked.max_tokens is not None and asked.max_tokens > room:
            both = f"a prompt of {len(ids)} tokens and max_tokens {asked.max_tokens}"
            message = f"{both} exceed the context of {context}"
            raise ApiError(400, message, "max_tokens", "context_length_exceeded")
        most = asked.max_tokens or min(room, asked.usual_tokens or room)
        for choice in range(asked.choices):
            seed = None if asked.params.seed is None else asked.params.seed + choice
            found.append((ids, replace(asked.params, max_new_tokens=most, seed=seed)))
    return found


async def collect(running, answer, watch):
    """Put all that comes into the answer."""
    async for index, update in running:
        watch.note(update)
        answer.add(index, update)


async def unless_gone(request, work):
    """Await `work`; if the client goes meanwhile, cancel it and raise an ApiError that nobody reads."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has gone")
        await task
    finally:
        task.cancel()
        gone.cancel()


async def disconnected(request):
    """Returns when the client has gone; its body has been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def whole_body(request):
    """The bytes of the body, JSON by its header, in good time and not too many."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Content-Type {kind!r:.80}: expected application/json")

    async def read():
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > LARGEST_BODY:
                raise ApiError(413, f"the body has more than {LARGEST_BODY} bytes")
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body has not arrived within {BODY_SECONDS} s") from None


async def refusal(request, error):
    """An ApiError as its error object."""
    return JSONResponse(error.object(), error.status, headers=error.headers)


async def no_such_route(request, error):
    """Starlette's 404 and 405 as an error object."""
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(
        ApiError(error.status_code, message).object(), error.status_code, headers=error.headers
    )


async def failure(request, error):
    """What nobody expected; uvicorn's log has the traceback."""
    return JSONResponse(
        ApiError(500, f"{type(error).__name__} in the server; its log says more").object(), 500
    )
