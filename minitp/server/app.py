"""The HTTP routes of the server."""

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
from minitp.server.body import largest_body, read_body, read_json
from minitp.server.requests import MAX_CHOICES, ApiError, chat_request, completion_request
from minitp.server.responses import ChatResponse, CompletionResponse, event
from minitp.util.format import counted

WORKERS = 4  # requests that are parsed and tokenized at the same time, and responses that are written
PAGE = Path(__file__).with_name("page.html")


def make_app(backend, metrics, model, api_key=None, chat_template_kwargs=None):
    """Return the ASGI application; see `run.serve_forever` for the parameters."""
    api = Api(backend, metrics, model, api_key, chat_template_kwargs or {})
    routes = [
        Route("/", lambda request: FileResponse(PAGE)),
        Route("/health", api.health),
        Route("/metrics", api.metrics_page),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.one_model),
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
    ]
    handlers = {ApiError: api_error, HTTPException: route_error, Exception: unexpected_error}
    return Starlette(routes=routes, exception_handlers=handlers)


class Api:
    """The handlers of the routes."""

    def __init__(self, backend, metrics, model, api_key, chat_template_kwargs):
        self.backend, self.metrics, self.model, self.api_key = backend, metrics, model, api_key
        self.chat_template_kwargs = chat_template_kwargs
        self.created = int(time.time())
        self.workers = asyncio.Semaphore(WORKERS)

    async def health(self, request):
        """Respond with 200 if requests are accepted, otherwise with 503."""
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
        return await self.respond(request, completion_request, CompletionResponse)

    async def chat(self, request):
        return await self.respond(request, chat_request, ChatResponse)

    async def respond(self, request, parse, response_class):
        """Respond to a request as a whole or as a stream; `parse` turns its body into an ApiRequest."""
        timer = RequestTimer(self.metrics, request.url.path)
        try:
            self.check_key(request)
            body = await read_body(request, self.largest_body())
            api_request = await self.in_worker(lambda: parse(read_json(body)))
            self.check_model(api_request.model)
            llm = self.backend.ready()
            self.backend.check_room(api_request.sequences)
            variables = self.chat_template_kwargs | api_request.chat_template_kwargs
            prompts = await self.in_worker(lambda: encode_prompts(llm, api_request, self.model, variables))
            running = await self.backend.submit(make_sequences(llm, api_request, prompts))
        except ApiError as error:
            timer.finish(error.status)
            raise
        token_text = str if llm.tokenizer is None else llm.tokenizer.token_text
        prompt_tokens, choices = sum(map(len, prompts)), len(prompts) * api_request.choices
        response = response_class(api_request, prompt_tokens, choices, token_text)
        if api_request.stream:
            return EventStream(running, response, timer)
        status = 499  # unless changed below, the client has disconnected
        try:
            await cancel_on_disconnect(request, collect(running, response, timer))
            content = await self.in_worker(response.json)
            status = 200
            return Response(content, media_type="application/json")
        except ApiError as error:
            status = error.status
            raise
        finally:
            running.stop()
            timer.finish(status, response)

    def largest_body(self):
        """Return the size limit of a body in bytes; raise ApiError 503 while there is no LLM."""
        context = self.backend.ready().description["context"]
        return largest_body(context, min(MAX_CHOICES, self.backend.limits.sequences))

    async def in_worker(self, function):
        """Run function() in one of a few threads, so that streams and /health go on; return its result."""
        async with self.workers:
            return await in_thread(function)

    def check_key(self, request):
        """Raise ApiError 401 if the server requires a key that the request does not have."""
        sent = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if self.api_key is not None and not hmac.compare_digest(sent, self.api_key.encode()):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    def check_model(self, name):
        """Raise ApiError 404 unless `name` is the model that this server runs."""
        if name != self.model:
            message = f"model {name[:200]!r} not found; this server runs {self.model!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def about_model(self):
        about = {"id": self.model, "object": "model", "created": self.created, "owned_by": "minitp"}
        if self.backend.llm is not None:
            about["max_model_len"] = self.backend.llm.description["context"]
        return about


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


def encode_prompts(llm, api_request, model, chat_template_kwargs):
    """Return the token ids of each prompt; `model` is the model's name in error messages."""
    try:
        if api_request.messages is not None:
            return [llm.encode_chat(api_request.messages, chat_template_kwargs)]
        return [llm.encode(prompt) for prompt in api_request.prompts]
    except InputError as error:
        code = "context_length_exceeded" if isinstance(error, ContextError) else None
        param = "prompt" if api_request.messages is None else "messages"
        # Clients must not learn the path of the model.
        message = str(error).replace(str(llm.source.name), model)
        raise ApiError(400, message, param, code) from error


def make_sequences(llm, api_request, prompts):
    """Return (prompt_ids, SamplingParams) of each choice, prompt after prompt."""
    sequences, context, max_tokens = [], llm.description["context"], api_request.max_tokens
    for ids in prompts:
        room = context - len(ids)
        if max_tokens is not None and max_tokens > room:
            message = (
                f"a prompt of {counted(len(ids), 'token')} plus max_tokens {max_tokens} exceed the context "
                f"of {context}"
            )
            raise ApiError(400, message, "max_tokens", "context_length_exceeded")
        max_new_tokens = max_tokens or min(room, api_request.default_tokens or room)
        for choice in range(api_request.choices):
            params = api_request.params
            seed = None if params.seed is None else params.seed + choice
            sequences.append((ids, replace(params, max_new_tokens=max_new_tokens, seed=seed)))
    return sequences


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


async def api_error(request, error):
    """Respond to an ApiError with its error object."""
    return JSONResponse(error.object(), error.status, headers=error.headers)


async def route_error(request, error):
    """Respond to Starlette's 404 and 405 with an error object."""
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(
        ApiError(error.status_code, message).object(), error.status_code, headers=error.headers
    )


async def unexpected_error(request, error):
    """Respond to any other exception with 500; uvicorn logs the traceback."""
    return JSONResponse(ApiError(500, f"{type(error).__name__} in the server; see its log").object(), 500)
