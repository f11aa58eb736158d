"""The HTTP routes of the server."""

import asyncio
import hmac
import time

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from minitp.server import tokenization
from minitp.server.backend import in_thread
from minitp.server.body import largest_body, read_body, read_json
from minitp.server.errors import ApiError, api_error, route_error, unexpected_error
from minitp.server.fields import MAX_CHOICES
from minitp.server.middleware import surround
from minitp.server.page import render
from minitp.server.prompts import encode_prompts, make_sequences
from minitp.server.ranks import about_ranks
from minitp.server.requests import chat_request, completion_request
from minitp.server.responses import ChatResponse, CompletionResponse, json_pieces
from minitp.server.streams import EventStream, RequestTimer, cancel_on_disconnect, collect

WORKERS = 4  # maximum number of threads that parse and tokenize requests and write responses


def make_app(backend, metrics, names, api_key=None, chat_template_kwargs=None, origins=()):
    """Return the ASGI application; see `run.serve_forever` for the parameters."""
    api = Api(backend, metrics, names, api_key, chat_template_kwargs or {})
    page = render()
    routes = [
        Route("/", lambda request: HTMLResponse(page)),
        Route("/health", api.health),
        Route("/ranks", api.ranks),
        Route("/metrics", api.metrics_page),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.one_model),
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/tokenize", api.tokenize, methods=["POST"]),
        Route("/detokenize", api.detokenize, methods=["POST"]),
        Route("/tokenizer_info", api.tokenizer_info),
    ]
    paths = [route.path for route in routes if route.path != "/v1/models/{name:path}"]
    handlers = {ApiError: api_error, HTTPException: route_error(paths), Exception: unexpected_error}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return surround(app, origins)


class Api:
    """The handlers of the routes."""

    def __init__(self, backend, metrics, names, api_key, chat_template_kwargs):
        self.backend, self.metrics, self.names, self.api_key = backend, metrics, names, api_key
        self.model = names[0]  # in responses
        self.chat_template_kwargs = chat_template_kwargs
        self.created = int(time.time())
        self.workers = asyncio.Semaphore(WORKERS)

    async def health(self, request):
        """Respond with 200 if requests are accepted, otherwise with 503."""
        state, replicas = self.backend.state, self.backend.replicas()
        content = {"status": "ok" if state == "ready" else state}
        if replicas:
            content |= {"replicas": len(replicas), "replicas_ready": sum(one["ready"] for one in replicas)}
        return JSONResponse(content, 200 if state == "ready" else 503)

    async def metrics_page(self, request):
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request):
        self.check_key(request)
        return JSONResponse({"object": "list", "data": [self.about_model(name) for name in self.names]})

    async def one_model(self, request):
        self.check_key(request)
        self.check_model(request.path_params["name"])
        return JSONResponse(self.about_model(request.path_params["name"]))

    async def completions(self, request):
        return await self.respond(request, completion_request, CompletionResponse)

    async def chat(self, request):
        return await self.respond(request, chat_request, ChatResponse)

    async def tokenize(self, request):
        variables = self.chat_template_kwargs
        return await self.answer(
            request,
            tokenization.tokenize_request,
            lambda llm, parsed: tokenization.tokenize(llm, parsed, self.model, variables),
        )

    async def detokenize(self, request):
        return await self.answer(
            request,
            tokenization.detokenize_request,
            lambda llm, parsed: tokenization.detokenize(llm, parsed, self.model),
        )

    async def tokenizer_info(self, request):
        self.check_key(request)
        llm = self.backend.ready()
        return JSONResponse(await self.in_worker(lambda: tokenization.tokenizer_info(llm, self.model)))

    async def ranks(self, request):
        self.check_key(request)
        llm = self.backend.ready()
        # Not one of the workers, so that the chat page need not wait for long requests.
        return JSONResponse(await in_thread(lambda: about_ranks(llm, self.model)))

    async def answer(self, request, parse, function):
        """Respond with the object that function(llm, parsed request) returns, without using the ranks."""
        with RequestTimer(self.metrics, request.url.path).finishing(500):
            parsed = await self.receive(request, parse)
            llm = self.backend.ready()
            content = await self.in_worker(lambda: "".join(json_pieces(function(llm, parsed))))
            return Response(content, media_type="application/json")

    async def receive(self, request, parse):
        """Receive the body of a request, check the key and the model, and return the parsed body."""
        self.check_key(request)
        body = await read_body(request, self.largest_body())
        parsed = await self.in_worker(lambda: parse(read_json(body)))
        if parsed.model is not None:
            self.check_model(parsed.model)
        return parsed

    async def respond(self, request, parse, response_class):
        """Respond to a request for completions; `parse` turns its body into an ApiRequest."""
        timer = RequestTimer(self.metrics, request.url.path)
        try:
            running, response = await self.submit(request, parse, response_class)
        except ApiError as error:
            timer.finish(error.status)
            raise
        if response.request.stream:
            return EventStream(running, response, timer)
        return await self.whole_response(request, running, response, timer)

    async def submit(self, request, parse, response_class):
        """Send a request for completions to the ranks; return (RunningRequest, the ApiResponse to fill)."""
        api_request = await self.receive(request, parse)
        api_request.model = self.model  # the name in the response
        llm = self.backend.ready()
        self.backend.check_room(api_request.sequences)
        variables = self.chat_template_kwargs
        prompts = await self.in_worker(lambda: encode_prompts(llm, api_request, self.model, variables))
        sequences = await self.in_worker(lambda: make_sequences(llm, api_request, prompts))
        running = await self.backend.submit(sequences)
        return running, response_class(api_request, prompts, llm.tokenizer)

    async def whole_response(self, request, running, response, timer):
        """Collect the output of a running request and respond with all of it at once."""
        with timer.finishing(499, response):  # what ends the block without a response is a lost client
            try:
                await cancel_on_disconnect(request, collect(running, response, timer))
                content = await self.in_worker(response.json)
                return Response(content, media_type="application/json")
            finally:
                running.stop()

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
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        sent = key.strip().encode() if scheme.lower() == "bearer" else b""
        if self.api_key is not None and not hmac.compare_digest(sent, self.api_key.encode()):
            message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key")

    def check_model(self, name):
        """Raise ApiError 404 unless `name` is one of the names of the model that this server runs."""
        if name not in self.names:
            names = " or ".join(map(repr, self.names))
            message = f"model {name[:200]!r} not found; this server runs {names}"
            raise ApiError(404, message, "model", "model_not_found")

    def about_model(self, name):
        about = {"id": name, "object": "model", "created": self.created, "owned_by": "minitp"}
        if self.backend.llm is not None:
            about["max_model_len"] = self.backend.llm.description["context"]
        return about
