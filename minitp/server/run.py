"""The server's process: its socket, its signals, and its exit."""

import asyncio
import logging
import resource
import signal
import socket
from contextlib import contextmanager
from functools import partial

import uvicorn

from minitp.errors import InputError
from minitp.server.app import make_app
from minitp.server.backend import Backend, in_thread, log
from minitp.server.connection import Connection
from minitp.server.metrics import Metrics
from minitp.util.format import counted

FAILED_S = 2  # time for which /health reports the failure before the process exits
FORCED_S = 3  # time for connections to close after their streams have been ended
SIGNALS = signal.SIGTERM, signal.SIGINT
BACKLOG = 256  # maximum number of connections that are accepted at a time
OPEN_FILES = 10240  # limit on open files to ask for, the highest that macOS allows
SPARE_FILES = 2 * BACKLOG  # open files for other purposes


def listen(host, port):
    """Return a socket bound to this address; raise InputError if that fails."""
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(address[0], socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address[4])
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--host {host} --port {port}: {reason}; choose another") from error
    listener.set_inheritable(False)
    return listener


def most_connections():
    """Raise the limit on open files, if it is low, and return the number of connections that it allows."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if most == resource.RLIM_INFINITY else min(OPEN_FILES, most)
    if limit != resource.RLIM_INFINITY and limit < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
        limit = wanted
    return OPEN_FILES if limit == resource.RLIM_INFINITY else max(limit - SPARE_FILES, limit // 2)


def serve_forever(
    start,
    ready_line,
    limits,
    names,
    listener,
    *,
    api_key,
    origins,
    chat_template_kwargs,
    restart,
    drain_seconds,
    verbose,
):
    """Serve until SIGTERM, Ctrl-C, or the death of a rank; return the exit code.

    Parameters
    ----------
    start, ready_line : callable
        Functions that start the LLM and describe it; see Backend.
    limits : AdmissionLimits
    names : list of str
        The names that clients may use for the model; responses have the first one.
    listener : socket
    api_key : str or None
    origins : list of str
        The origins whose pages may use the server, such as "https://example.com"; "*" for all.
    chat_template_kwargs : dict or None
        Variables of the chat template, which a request may override.
    restart : bool
        Start the ranks again if one dies.
    drain_seconds : float
        The time for unfinished responses after SIGTERM.
    verbose : bool
        Log every request.
    """
    backend = Backend(start, ready_line, limits, restart)
    app = make_app(backend, Metrics(backend), names, api_key, chat_template_kwargs, origins)
    config = uvicorn.Config(
        app,
        http=partial(Connection, most=most_connections()),
        backlog=BACKLOG,
        lifespan="off",
        log_level="info" if verbose else "error",
        access_log=verbose,
        timeout_graceful_shutdown=FORCED_S,
    )
    logging.getLogger("uvicorn.error").addFilter(is_not_cancellation)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        return asyncio.run(serve(backend, Server(config), listener, drain_seconds))
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # what is left to do ends soon
        if backend.llm is not None:
            backend.llm.close()
        if backend.state != "draining":  # else further signals are ignored until the process has ended
            for number, handler in before.items():
                signal.signal(number, handler)


class Server(uvicorn.Server):
    """A uvicorn server that leaves the signals to `serve`."""

    @contextmanager
    def capture_signals(self):
        yield

    def end_now(self):
        """End all connections and the server, without waiting for responses."""
        self.should_exit = self.force_exit = True
        for connection in list(self.server_state.connections):
            connection.transport.abort()


async def serve(backend, server, listener, drain_seconds):
    """Run the HTTP server and the ranks until either of them ends; return the exit code."""
    loop = asyncio.get_running_loop()
    first, second = loop.create_future(), loop.create_future()  # the names of signals

    def on_signal(number):
        if not first.done():
            first.set_result(number.name)
        elif not second.done():
            second.set_result(number.name)
            server.end_now()

    for number in SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    ranks = asyncio.ensure_future(backend.run())
    http = asyncio.ensure_future(server.serve(sockets=[listener]))
    drained = asyncio.ensure_future(drain(backend, first, drain_seconds))
    await asyncio.wait({ranks, http, drained, second}, return_when=asyncio.FIRST_COMPLETED)
    code = 0
    if ranks.done():
        error = ranks.result()
        log(error)
        code = error.exit_code
        if not first.done() and backend.llm is not None:
            await asyncio.sleep(FAILED_S)
    server.should_exit = True
    await http
    ranks.cancel()
    drained.cancel()
    if backend.llm is not None:
        closing = asyncio.ensure_future(in_thread(backend.llm.close))
        await asyncio.wait({closing, second}, return_when=asyncio.FIRST_COMPLETED)
        if second.done():
            backend.llm.close(wait=False)
        await closing
    return code


async def drain(backend, first, seconds):
    """Reject new requests after the first signal, and give the others time to finish."""
    name = await first
    what = "shutting down"
    if count := len(backend.running):
        what = f"finishing {counted(count, 'request')}, up to {seconds:g} s; a second signal ends at once"
    log(f"{name}: {what}")
    await backend.drain(seconds)


def is_not_cancellation(record):
    """Return False for log records of tasks that were cancelled because the server ends."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))
