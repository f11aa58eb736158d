"""`minitp serve`."""

import ipaddress
import os
import sys
from pathlib import Path

from minitp.cli.shared_options import llm_options
from minitp.errors import InputError
from minitp.llm import LLM


def run(args, tp):
    """Serve a model over HTTP until SIGTERM or Ctrl-C; the exit code."""
    try:
        from minitp.server.backend import AdmissionLimits
        from minitp.server.run import listen, serve_forever
    except ImportError as error:
        raise InputError(
            f"minitp serve needs the package {error.name!r}: pip install 'minitp[serve]'"
        ) from error
    check(args)
    api_key = args.api_key or os.environ.get("MINITP_API_KEY")
    listener = listen(args.host, args.port)
    host, port = listener.getsockname()[:2]
    if not ipaddress.ip_address(host).is_loopback and not api_key:
        print(f"minitp: warning: {host} is not only this machine, and there is no --api-key", file=sys.stderr)

    def start(on_end):
        llm = LLM(**llm_options(args, tp), on_end=on_end)
        print(ready_line(llm, host, port), file=sys.stderr, flush=True)
        return llm

    return serve_forever(
        start,
        AdmissionLimits(args.max_sequences + args.max_queue, args.request_timeout),
        served_name(args.model),
        listener,
        api_key=api_key,
        restart=args.restart,
        drain_seconds=args.drain_timeout,
        verbose=args.verbose,
    )


def check(args):
    """Refuse what cannot be."""
    if not 0 <= args.port < 1 << 16:  # getaddrinfo would take it modulo that
        raise InputError(f"--port {args.port}: expected a number from 0 to 65535")
    for name, least in (("max_queue", 0), ("request_timeout", 1), ("drain_timeout", 0)):
        if getattr(args, name) < least:
            option = name.replace("_", "-")
            raise InputError(f"--{option} {getattr(args, name)}: expected {least} or more")


def served_name(model):
    """How clients call the model: of a directory or file its last part."""
    return Path(model).resolve().name if os.path.exists(model) else model


def ready_line(llm, host, port):
    about = llm.description
    address = f"[{host}]" if ":" in host else host
    return (
        f"minitp: {llm.source.name} on {about['tp']} ranks, {about['dtype']}, at http://{address}:{port}/v1 "
        f"(context {about['context']}, cache of {about['blocks'] * about['block_size']} tokens); "
        f"a page to chat: http://{address}:{port}/"
    )
