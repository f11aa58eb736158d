"""The layers around the routes: request ids, permissions for other origins, and trailing slashes."""

import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware

REQUEST_ID = "x-request-id"
LONGEST_ID = 128  # characters


def surround(app, origins):
    """Return `app` with these layers; web pages of `origins` may use it ("*": of all origins)."""
    app = without_trailing_slash(app)
    if origins:
        app = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID, "Retry-After"],
        )
    return with_request_id(app)


def without_trailing_slash(app):
    """Return an ASGI application that responds to /path/ as `app` does to /path."""

    async def wrapped(scope, receive, send):
        if scope["type"] == "http":
            scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        await app(scope, receive, send)

    return wrapped


def with_request_id(app):
    """Return an ASGI application whose responses have the client's X-Request-Id, or else a new one."""

    async def wrapped(scope, receive, send):
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        value = request_id(Headers(scope=scope).get(REQUEST_ID, ""))

        async def send_with_id(message):
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = value
            await send(message)

        await app(scope, receive, send_with_id)

    return wrapped


def request_id(sent):
    """Return the id that a client has sent if it is short and printable ASCII, or else a new one."""
    usable = sent.isascii() and sent.isprintable() and 0 < len(sent) <= LONGEST_ID
    return sent if usable else uuid.uuid4().hex
