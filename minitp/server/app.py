"""The HTTP routes of the server."""

import asyncio
import hmac
import time
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
