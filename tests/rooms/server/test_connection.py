"""Clients that send headers slowly, do not read, or open too many connections; no model is needed."""

import asyncio
import resource
import socket
import threading
import time
from contextlib import suppress
from functools import partial

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from minitp.server import connection
from minitp.server.connection import Connection
from minitp.server.run import most_connections

LIMIT_S = 0.4
MOST = 4  # connections
REQUEST = b"GET /answer HTTP/1.1\r\nHost: test\r\n"


class Site:
    """A server that answers at once, reads a body, or streams without an end."""

    def __init__(self):
        self.stream_ended = threading.Event()
        routes = [Route(f"/{f.__name__}", f, methods=["GET", "POST"]) for f in (answer, body, self.stream)]
        http = partial(Connection, most=MOST)
        config = uvicorn.Config(Starlette(routes=routes), http=http, log_level="error", lifespan="off")
        self.server = uvicorn.Server(config)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()

    async def stream(self, request):
        async def pieces():
            try:
                while True:
                    yield b"x" * 200_000
                    await asyncio.sleep(0)
            finally:
                self.stream_ended.set()

        return StreamingResponse(pieces())

    def connect(self, path=None):
        """Open a connection and request a path, if one is given."""
        client = socket.create_connection(self.listener.getsockname(), timeout=10)
        if path is not None:
            client.sendall(REQUEST.replace(b"/answer", path.encode()) + b"\r\n")
        return client

    def end(self):
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(10)


async def answer(request):
    return PlainTextResponse("answered")


async def body(request):
    return PlainTextResponse(f"{len(await request.body())} bytes")


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setattr(connection, "HEADER_SECONDS", LIMIT_S)
    monkeypatch.setattr(connection, "STALLED_SECONDS", LIMIT_S)
    site = Site()
    yield site
    site.end()


def receive(client, text):
    """Read until the text has arrived."""
    received = b""
    while text not in received:
        part = client.recv(1000)
        assert part, received
        received += part


def drip(client, seconds):
    """Send bytes slowly until the server closes the connection, which must be within `seconds`."""
    begun = time.monotonic()
    client.settimeout(0.05)
    while time.monotonic() - begun < seconds:
        try:
            client.sendall(b"a")
            if not client.recv(1000):
                return
        except TimeoutError:
            pass
        except OSError:
            return
    pytest.fail(f"the connection is open after {seconds} s")


def test_headers_have_a_time_limit(site):
    """Send nothing, a part of the headers, or a part of the headers of a second request."""
    silent, slow, second = site.connect(), site.connect(), site.connect("/answer")
    slow.sendall(REQUEST + b"X: ")
    receive(second, b"answered")
    second.sendall(REQUEST + b"X: ")
    for client in (slow, second):
        drip(client, 5 * LIMIT_S)
    assert silent.recv(1) == b""


def test_a_body_after_its_answer_has_a_time_limit(site):
    client = site.connect()
    client.sendall(b"POST /answer HTTP/1.1\r\nHost: test\r\nContent-Length: 1000\r\n\r\n")
    receive(client, b"answered")
    drip(client, 5 * LIMIT_S)


def test_a_slow_body_is_no_slow_header(site):
    client = site.connect()
    client.sendall(b"POST /body HTTP/1.1\r\nHost: test\r\nContent-Length: 8\r\n\r\n")
    for _ in range(8):
        time.sleep(LIMIT_S / 4)
        client.sendall(b"a")
    receive(client, b"8 bytes")


def test_a_client_that_does_not_read_is_disconnected(site):
    client = site.connect("/stream")
    assert client.recv(100)
    assert site.stream_ended.wait(20 * LIMIT_S)
    assert not site.server.server_state.connections


def test_a_client_that_reads_slowly_is_served(site):
    client = site.connect("/stream")
    end = time.monotonic() + 4 * LIMIT_S
    while time.monotonic() < end:
        assert client.recv(1 << 20)
        time.sleep(LIMIT_S / 10)
    assert not site.stream_ended.is_set()


def test_one_connection_too_many_is_closed(site):
    clients = [site.connect("/answer") for _ in range(MOST)]
    for client in clients:
        receive(client, b"answered")
    further = site.connect("/answer")
    with suppress(ConnectionResetError):  # raised if the request arrives after the connection is closed
        assert further.recv(1000) == b""
    clients[0].close()
    deadline = time.monotonic() + 5
    while len(site.server.server_state.connections) >= MOST and time.monotonic() < deadline:
        time.sleep(0.01)
    receive(site.connect("/answer"), b"answered")


@pytest.mark.parametrize(
    ("limits", "raised_to", "connections"),
    [
        ((1024, 4096), 4096, 3584),
        ((1024, resource.RLIM_INFINITY), 10240, 9728),
        ((20000, 20000), None, 19488),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), None, 10240),
        ((600, 600), None, 300),
    ],
)
def test_the_number_of_connections_leaves_files_for_the_rest(monkeypatch, limits, raised_to, connections):
    new = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: new.append(pair))
    assert most_connections() == connections
    assert new == ([] if raised_to is None else [(raised_to, limits[1])])
