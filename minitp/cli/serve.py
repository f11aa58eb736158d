"""`minitp serve`: an OpenAI-compatible HTTP server."""

import ipaddress
import os
import re
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

from minitp.cli.command import Caller
from minitp.cli.options import (
    add_chat_template_kwargs,
    add_max_context,
    add_replicas,
    add_run,
    llm_options,
)
from minitp.engine.options import option
from minitp.errors import InputError, shown
from minitp.util.format import counted

ORIGIN = re.compile(r"null|[a-z][a-z0-9+.-]*://[^/A-Z\s]+")  # as browsers send it


class ServeCommand(Caller):
    """The command `minitp serve`."""

    name = "serve"
    summary = "serve a model over HTTP with an OpenAI-compatible API"
    description = (
        "Serve a model over HTTP until SIGTERM or Ctrl-C. The paths are /v1/completions, "
        "/v1/chat/completions, /v1/models, /tokenize, /detokenize, /tokenizer_info, /ranks, /health, "
        "/metrics, and a chat page at /."
    )
    examples = (
        ("minitp serve --port 8000", "serve the demo model on this machine"),
        (
            "minitp serve --model ./Mistral-7B-Instruct-v0.3 --host 0.0.0.0 --tp 4 --max-sequences 32",
            "serve a model on the network; set MINITP_API_KEY first",
        ),
    )

    def add_options(self, parser):
        add_server(parser)
        add_chat_template_kwargs(parser, "server")
        add_batching(parser)
        add_run(parser)
        add_replicas(parser, "divide the requests among N copies of the model, each on its own --tp ranks")
        add_max_context(parser)

    def run(self, args, tp):
        """Serve a model over HTTP until SIGTERM or Ctrl-C."""
        try:
            from minitp.server.backend import AdmissionLimits
            from minitp.server.run import listen, serve_forever
        except ImportError as error:
            raise InputError(
                f"minitp serve needs the package {error.name!r}: pip install 'minitp[serve]'"
            ) from error
        from minitp.llm import LLM
        from minitp.loading.source import open_model

        check(args)
        api_key = os.environ.get("MINITP_API_KEY") or None if args.api_key is None else args.api_key
        check_key(api_key)
        listener = listen(args.host, args.port)
        host, port = listener.getsockname()[:2]
        if not ipaddress.ip_address(host).is_loopback and not api_key:
            print(
                f"minitp: warning: {host} is reachable from other machines, and no --api-key is set",
                file=sys.stderr,
            )

        def start(on_end):
            source = open_model(args.model, tp, args.layers, args.revision, args.split)
            check_chat_template(source, args.chat_template_kwargs)
            return LLM(**llm_options(args, tp), on_end=on_end)

        return serve_forever(
            start,
            partial(ready_line, host=host, port=port),
            AdmissionLimits(args.replicas * args.max_sequences + args.max_queue, args.request_timeout),
            list(dict.fromkeys(args.served_model_name or [served_name(args.model)])),
            listener,
            api_key=api_key,
            origins=args.allow_origin or [],
            chat_template_kwargs=args.chat_template_kwargs,
            restart=args.restart,
            drain_seconds=args.drain_timeout,
            verbose=args.verbose,
        )


def add_server(parser):
    """Add the options of the HTTP server."""
    group = parser.groups["server"]
    group.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="NAME",
        help="address to listen on; 0.0.0.0 for all interfaces (default: 127.0.0.1, this machine only)",
    )
    group.add_argument(
        "--port",
        type=int,
        default=8000,
        metavar="N",
        help="port to listen on; 0 for any free port (default: 8000)",
    )
    group.add_argument(
        "--api-key",
        metavar="KEY",
        help="key that clients must send; `ps` shows it, so prefer MINITP_API_KEY (default: no key)",
    )
    group.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="names of the model for clients; responses have the first one (default: the value of --model, "
        "or the last part of a path)",
    )
    group.add_argument(
        "--allow-origin",
        action="append",
        metavar="ORIGIN",
        help="allow web pages of this origin, such as https://example.com, to send requests; * for all "
        "origins; can be repeated (default: only the chat page)",
    )
    group.add_argument(
        "--max-queue",
        type=int,
        default=256,
        metavar="N",
        help="maximum number of waiting sequences; further requests get status 429 (default: 256)",
    )
    group.add_argument(
        "--request-timeout",
        type=float,
        default=600,
        metavar="S",
        help="time limit for an answer in seconds (default: 600)",
    )
    group.add_argument(
        "--drain-timeout",
        type=float,
        default=30,
        metavar="S",
        help="time limit for unfinished answers after SIGTERM, in seconds (default: 30)",
    )
    group.add_argument(
        "--restart",
        action="store_true",
        help="restart the ranks if one dies, or those of its replica while the others serve (default: go on "
        "with the other replicas, and exit with the last)",
    )


def add_batching(parser):
    """Add the limits on the number of concurrent requests and on their memory."""
    group = parser.groups["batching"]
    group.add_argument(
        "--max-sequences",
        type=int,
        default=64,
        metavar="N",
        help="maximum number of sequences that run at once on each replica; a request with n > 1 counts as n "
        "(default: 64)",
    )
    group.add_argument(
        "--max-tokens-per-step",
        type=int,
        default=512,
        metavar="N",
        help="maximum number of tokens in one forward pass, over all requests (default: 512)",
    )
    group.add_argument(
        "--cache-tokens",
        type=int,
        metavar="N",
        help="size of each replica's KV cache in tokens, for all requests (default: as many as fit in a "
        "quarter of the host's memory, or in most of a GPU's free memory)",
    )
    group.add_argument(
        "--block-size",
        type=int,
        default=16,
        metavar="N",
        help="number of tokens in a block of the KV cache (default: 16)",
    )


def check(args):
    """Reject numbers that are out of range, an empty name, and origins that no browser sends."""
    if not 0 <= args.port < 1 << 16:  # getaddrinfo would reduce it modulo 65536
        raise InputError(f"--port {args.port}: expected a number from 0 to 65535")
    for name, least in (("max_queue", 0), ("request_timeout", 1), ("drain_timeout", 0)):
        if getattr(args, name) < least:
            raise InputError(f"{option(name)} {getattr(args, name)}: expected {least} or more")
    if "" in (args.served_model_name or []):
        raise InputError("--served-model-name '': expected a name that is not empty")
    for origin in args.allow_origin or []:
        if origin != "*" and not ORIGIN.fullmatch(origin):
            raise InputError(
                f"--allow-origin {shown(origin)}: expected * or an origin such as https://example.com or "
                "http://localhost:3000, in lower case and without a path"
            )


def check_key(key):
    """Reject a key that clients cannot send in a header, without showing it."""
    if key == "":  # such as that of a variable that is not set
        raise InputError("--api-key is empty; give a key, or leave the option out")
    if key and not (key.isascii() and key.isprintable() and key == key.strip()):
        raise InputError(
            "the API key has spaces at its ends, or characters that are not printable ASCII, so clients "
            "cannot send it in a header; choose another"
        )


def check_chat_template(source, variables):
    """Raise InputError if a model has a chat template that fails, so that not every chat fails later.

    A model without one can still complete texts, and a template may reject a conversation as short as this.
    """
    from minitp.text.chat_template import NoChatTemplateError, RejectedMessagesError

    with suppress(NoChatTemplateError, RejectedMessagesError):
        source.chat_template().render([{"role": "user", "content": "?"}], variables)


def served_name(model):
    """Return the model's name for clients; of a path this is the last part."""
    return Path(model).resolve().name if os.path.exists(model) else model


def ready_line(llm, host, port):
    """Return the line that announces the model, its ranks and its address."""
    about = llm.description
    address = f"[{host}]" if ":" in host else host
    ranks, each = counted(about["tp"], "rank"), ""
    if about["replicas"] > 1:
        each = " each"
        ranks = f"{counted(about['replicas'], 'replica')} of {ranks}"
    return (
        f"{llm.source.name} on {ranks}, {about['dtype']}, "
        f"at http://{address}:{port}/v1 "
        f"(context {about['context']}, "
        f"cache of {counted(about['blocks'] * about['block_size'], 'token')}{each}); "
        f"chat page: http://{address}:{port}/"
    )
