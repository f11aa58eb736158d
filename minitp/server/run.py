"""The server's process: its socket, its signals, and its exit."""

import asyncio
import signal
import socket
import sys
from contextlib import contextmanager

import uvicorn

from minitp.errors import InputError
from minitp.server.app import make_app
from minitp.server.backend import Backend
from minitp.server.metrics import Metrics

FAILED_S = 2  # time for which /health reports the failure before the process exits
FORCED_S = 3  # time for connections to close after their streams have been ended


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


def serve_forever(
    start, limits, model, listener, *, api_key, chat_template_kwargs, restart, drain_seconds, verbose
):
    """Serve until SIGTERM, Ctrl-C, or the death of a rank; return the exit code.

    Parameters
    ----------
    start : callable
        A function that starts the LLM; see Backend.
    limits : AdmissionLimits
    model : str
        The name that clients must use for the model.
    listener : socket
    api_key : str or None
    chat_template_kwargs : dict or None
        Variables of the chat template, which a request may override.
    restart : bool
        Start the ranks again if one dies.
    drain_seconds : float
        The time for unfinished responses after SIGTERM.
    verbose : bool
        Log every request.
    """
    backend = Backend(start, limits, restart)
    app = make_app(backend, Metrics(backend), model, api_key, chat_template_kwargs)
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_level="info" if verbose else "error",
        access_log=verbose,
        timeout_graceful_shutdown=drain_seconds + FORCED_S,
    )
    try:
        return asyncio.run(serve(backend, Server(config), listener, drain_seconds))
    finally:
        if backend.llm is not None:
            backend.llm.close()


class Server(uvicorn.Server):
    """A uvicorn server that leaves the signals to `serve`."""

    @contextmanager
    def capture_signals(self):
        yield


async def serve(backend, server, listener, drain_seconds):
    """Run the HTTP server and the ranks until either of them ends; return the exit code."""
    loop = asyncio.get_running_loop()

    def shut_down():
        server.force_exit = server.should_exit  # a second signal ends the server at once
        server.should_exit = True
        backend.state = "draining"
        loop.call_later(drain_seconds, backend.abort_all)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, shut_down)
    ranks = asyncio.ensure_future(backend.run())
    http = asyncio.ensure_future(server.serve(sockets=[listener]))
    await asyncio.wait({ranks, http}, return_when=asyncio.FIRST_COMPLETED)
    code = 0
    if ranks.done():
        error = ranks.result()
        print(f"minitp: {error}", file=sys.stderr)
        code = error.exit_code
        if not server.should_exit and backend.llm is not None:
            await asyncio.sleep(FAILED_S)
        server.config.timeout_graceful_shutdown = FORCED_S
        server.should_exit = True
        await http
    ranks.cancel()
    return code
