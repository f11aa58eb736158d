"""The bodies of requests: their size limit, how they are received, and their JSON.

A body may be large: it may hold several prompts that fill the context. While `json` parses in C, no other
thread runs, and so no stream and no /health. So larger bodies are parsed in Python, which takes longer and
lets other threads run.
"""

import asyncio
import json
from itertools import count
from json import scanner

from starlette.requests import ClientDisconnect

from minitp.server.errors import ApiError
from minitp.util.format import counted

BODY_SECONDS = 60  # time for a body to arrive
BYTES_PER_TOKEN = 16  # of JSON: an id has up to 8, a word of a text fewer, and escapes more
SMALL_BODY = 1 << 20  # bytes, allowed for every model
LARGE_BODY = 8 << 20  # bytes, not exceeded for the sake of several prompts
PARSED_IN_C = 1 << 18  # bytes, which take at most 0.05 s
MAX_LISTS, MAX_MEMBERS = 100_000, 10_000  # in a body that is parsed in Python; see SharingDecoder


def largest_body(context, prompts):
    """Return the size limit of a body in bytes: for one prompt that fills the context, or several in 8 MiB.

    Parameters
    ----------
    context : int
        The context in tokens.
    prompts : int
        The maximum number of prompts in a request.
    """
    one = BYTES_PER_TOKEN * context
    return max(SMALL_BODY, one, min(LARGE_BODY, prompts * one))


async def read_body(request, limit):
    """Return the bytes of the body; reject one that is not plain JSON, too large, or slow."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, f"Content-Type {content_type!r:.80}: expected application/json")
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise ApiError(415, f"Content-Encoding {encoding!r:.80}: send the body uncompressed")
    check_size(int(request.headers.get("content-length", 0)), limit)

    async def read():
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            check_size(len(body), limit)
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS} s") from None
    except ClientDisconnect:
        raise ApiError(499, "the client has disconnected") from None


def check_size(size, limit):
    """Raise ApiError 413 for a body above the limit; uvicorn drops what still arrives of it."""
    if size > limit:
        most = counted(limit, "byte")
        raise ApiError(413, f"the body has more than {most}, the limit for this model's context")


def read_json(data):
    """Return the JSON object in a body."""
    try:
        decoder = json.JSONDecoder if len(data) <= PARSED_IN_C else SharingDecoder
        text = data.decode(json.detect_encoding(data))
        body = json.loads(text, cls=decoder, parse_constant=reject_constant)
        check_texts(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the body is JSON, but not an object")
    return body


class SharingDecoder(json.JSONDecoder):
    """A JSON decoder in Python, which other threads can interrupt; only strings are read in C.

    It rejects bodies of too many lists and objects, for which the garbage collector stops all threads, and
    objects of too many members, whose hash table is built in one go.
    """

    def __init__(self, **options):
        super().__init__(**options)
        parse_array, parse_object, values = self.parse_array, self.parse_object, count(1)

        def array(*arguments):
            check_count(next(values), MAX_LISTS, "lists and objects")
            return parse_array(*arguments)

        def object_(start, strict, scan, *rest):
            check_count(next(values), MAX_LISTS, "lists and objects")
            members = count(1)

            def member(text, index):
                check_count(next(members), MAX_MEMBERS, "members in an object")
                return scan(text, index)

            return parse_object(start, strict, member, *rest)

        self.parse_array, self.parse_object = array, object_
        self.scan_once = scanner.py_make_scanner(self)


def check_count(number, limit, things):
    """Raise ValueError for more than `limit` things."""
    if number > limit:
        raise ValueError(f"more than {limit} {things}")


def check_texts(value):
    """Raise ValueError if a string in this JSON value has half a surrogate pair."""
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, list):
        for item in value:
            check_texts(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            name.encode()
            check_texts(item)


def reject_constant(name):
    raise ValueError(f"{name} is not JSON")
