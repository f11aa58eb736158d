"""Send `minitp serve` heavy requests one by one, and measure what other clients notice.

    python benchmarks/server_floods.py [--context 8192] [--tp 2] [--only WORD]

The model is tiny and has the demo model's tokenizer, so the time goes to HTTP, JSON and text, not to matrix
products. While a stream runs and /health is asked every 20 ms, each heavy request is sent and answered. The
table has, for each request, the status and time of its answer, the longest time that /health took, and the
longest gap between two pieces of the stream. The last line has the worst of both. Needs minitp[serve], an
mpirun and httpx.
"""

import argparse
import asyncio
import http.client
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from shutil import copy
from time import perf_counter

import httpx
import numpy as np
from safetensors.numpy import save_file

from minitp.loading.config import parse_config
from minitp.loading.source import open_model
from minitp.shard import make_plan

URL = re.compile(r"at http://(\S+)/v1 ")
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MEGABYTE = 1 << 20
LIMIT_S = 120  # for the answer to one request
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "vocab_size": 49152, "tie_word_embeddings": True}


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--context", type=int, default=8192)
    arguments.add_argument("--tp", type=int, default=2)
    arguments.add_argument("--only", default="", help="send only the requests whose name contains this word")
    args = arguments.parse_args()
    cases = {name: case for name, case in heavy_requests(args.context).items() if args.only in name}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "tiny", args.context)
        command = [sys.executable, "-m", "minitp", "serve", "--model", f"{folder}/tiny", "--port", "0"]
        process = subprocess.Popen([*command, "--tp", str(args.tp)], stderr=subprocess.PIPE, text=True)
        try:
            asyncio.run(measure(address_of(process), cases))
        finally:
            process.terminate()
            process.wait()


def write_model(directory, context):
    """Write a tiny Llama with random weights and the demo model's tokenizer."""
    directory.mkdir()
    demo = open_model("smollm2", 1).directory
    for name in ("tokenizer.json", "tokenizer_config.json"):
        copy(demo / name, directory / name)
    fields = json.loads((demo / "config.json").read_text()) | SHAPE | {"max_position_embeddings": context}
    fields.pop("head_dim", None)
    (directory / "config.json").write_text(json.dumps(fields))
    rng = np.random.default_rng(0)
    tensors = make_plan(parse_config(fields, "tiny"), tp=1).tensors
    values = {name: rng.standard_normal(part.shape, np.float32) / 6 for name, part in tensors.items()}
    save_file(values, directory / "model.safetensors")


def address_of(process):
    """Return the server's host and port, once it has printed them."""
    for line in process.stderr:
        if found := URL.search(line):
            threading.Thread(target=process.stderr.read, daemon=True).start()  # keeps the pipe empty
            return found[1]
    sys.exit(f"minitp serve exited with code {process.wait()}")


def heavy_requests(context):
    """Return {name: (route, body)}."""
    draw = random.Random(0)
    words = ["the", "of", "and", "hello", "world", "tensor", "parallel", "inference", "rank", "shard"]
    text = " ".join(draw.choice(words) for _ in range(2 * MEGABYTE))[: 8 * MEGABYTE - 1000]
    ids = [draw.randrange(1000, 49000) for _ in range(1_100_000)]
    some, short = ids[: context - 100], {"max_tokens": 8}
    message = {"role": "user", "content": "Hi"}

    def many(element, size=8 * MEGABYTE - 1000):
        """Return the JSON of a prompt that repeats an element up to a number of bytes."""
        return b'{"model":"tiny","prompt":[' + (element * (size // len(element))).rstrip(b",") + b"]}"

    cases = {
        "text of 8 MB": (COMPLETIONS, {"prompt": text}),
        "digits, 8 MB": (COMPLETIONS, {"prompt": "1" * (8 * MEGABYTE - 1000)}),
        "text, the longest allowed": (COMPLETIONS, {"prompt": text[: 128 * context]}),
        "text that fills the context": (COMPLETIONS, {"prompt": text[: 5 * context]} | short),
        "message of 8 MB": (CHAT, {"messages": [{"role": "user", "content": text}]}),
        "8 MB of ids": (COMPLETIONS, {"prompt": ids}),
        "8 MB of ids 1": (COMPLETIONS, many(b"1,")),
        "8 MB of numbers 1.5": (COMPLETIONS, many(b"1.5,")),
        "8 MB of []": (COMPLETIONS, many(b"[],")),
        "8 MB of [1]": (COMPLETIONS, many(b"[1],")),
        "8 MB of {}": (COMPLETIONS, many(b"{},")),
        "8 MB of [": (COMPLETIONS, b"[" * 8 * MEGABYTE),
        "8 MB of escapes": (COMPLETIONS, b'{"model":"tiny","prompt":"' + rb"\ud83d\ude00" * 690_000 + b'"}'),
        "64 MB": (COMPLETIONS, b" " * 64 * MEGABYTE),
        "1000 levels of [": (COMPLETIONS, b'{"a":' + b"[" * 1000 + b"]" * 1000 + b"}"),
        "128 prompts of 60 kB": (COMPLETIONS, {"prompt": [text[:60_000]] * 128} | short),
        "128 short prompts": (COMPLETIONS, {"prompt": ["Hello"] * 128} | short),
        "64 prompts that fill the context": (COMPLETIONS, {"prompt": [some] * 64} | short),
        "n: 128, a prompt that fills the context": (COMPLETIONS, {"prompt": some, "n": 128} | short),
        "100,000 prompts": (COMPLETIONS, {"prompt": ["Hello"] * 100_000}),
        "200,000 messages": (CHAT, {"messages": [message] * 200_000}),
        "messages that fill the context": (CHAT, {"messages": [message] * (context // 8)} | short),
        "a message of 250,000 parts": (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 250_000}]},
        ),
        "32 stops of 1024": (
            COMPLETIONS,
            {"prompt": "Hi", "stop": ["a" * 1024] * 32, "n": 64, "max_tokens": 64},
        ),
        "100,000 stops": (COMPLETIONS, {"prompt": "Hi", "stop": ["ab"] * 100_000}),
        "seed of 10,000 digits": (
            COMPLETIONS,
            b'{"model":"tiny","prompt":"Hi","seed":' + b"9" * 10_000 + b"}",
        ),
        "n: 10^4000": (COMPLETIONS, {"prompt": "Hi", "n": 10**4000}),
        "best_of 10^9": (COMPLETIONS, {"prompt": "Hi", "best_of": 10**9}),
        "logit_bias of 500,000 tokens": (
            COMPLETIONS,
            {"prompt": "Hi", "logit_bias": {str(n): 1 for n in range(500_000)}},
        ),
        "model name of 8 MB": (COMPLETIONS, {"prompt": "Hi", "model": text}),
        "unknown field of 8 MB": (COMPLETIONS, {"prompt": "Hi", text: 1}),
        "64 choices with 20 logprobs": (
            CHAT,
            {"messages": [message], "n": 64, "logprobs": True, "top_logprobs": 20, "max_tokens": 250},
        ),
        "32 choices with 20 logprobs, streamed": (
            COMPLETIONS,
            {"prompt": "Hi", "n": 32, "logprobs": 20, "max_tokens": 100, "stream": True},
        ),
        "20 logprobs up to the context": (
            COMPLETIONS,
            {"prompt": "Hi", "n": 1, "logprobs": 20, "max_tokens": min(context, 16384) - 100},
        ),
        "stop of 1 MB": (COMPLETIONS, {"prompt": "Hi", "stop": "ab" * (MEGABYTE // 2), "max_tokens": 50}),
    }
    fixed = {"model": "tiny", "temperature": 0, "ignore_eos": True}
    return {
        name: (route, body if isinstance(body, bytes) else json.dumps(fixed | body).encode())
        for name, (route, body) in cases.items()
    }


async def measure(address, cases):
    """Send the requests one by one and print the table."""
    watch = Watch()
    limits = httpx.Timeout(LIMIT_S)
    async with httpx.AsyncClient(base_url=f"http://{address}", timeout=limits) as client:
        watching = [asyncio.ensure_future(watch.health(client)), asyncio.ensure_future(watch.stream(client))]
        await asyncio.sleep(2)
        print(f"{'request':42}{'bytes':>10}{'status':>8}{'answer':>9}{'/health':>9}{'gap':>9}")
        print(f"{'nothing':59} {'':>9}" + "".join(f"{value:8.3f} s"[1:].rjust(9) for value in watch.worst()))
        all_worst = []
        for name, (route, body) in cases.items():
            watch.begin()
            started = perf_counter()
            status = await asyncio.to_thread(post, address, route, body)
            seconds = perf_counter() - started
            await asyncio.sleep(0.3)
            worst = watch.worst()
            all_worst.append(worst)
            times = "".join(f"{value:.3f} s".rjust(9) for value in (seconds, *worst))
            print(f"{name:42}{len(body):10}{status:>8}{times}", flush=True)
        health, gap = map(max, zip(*all_worst, strict=True))
        print(f"worst: /health {health:.3f} s, gap of the stream {gap:.3f} s")
        for task in watching:
            task.cancel()


def post(address, route, body):
    """Send a body and read the whole answer; return its status."""
    connection = http.client.HTTPConnection(address, timeout=LIMIT_S)
    try:
        connection.request("POST", route, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        while answer.read(MEGABYTE):
            pass
        return str(answer.status)
    except OSError as error:
        return type(error).__name__[:7]
    finally:
        connection.close()


class Watch:
    """The other clients of the server: one that asks /health, and one that reads a stream."""

    def __init__(self):
        self._asked = self._last = None  # times of the question not yet answered and of the last piece
        self.begin()

    def begin(self):
        """Forget the longest times so far."""
        self._health = self._gap = 0.0

    def worst(self):
        """Return the longest answer of /health and the longest gap of the stream, in seconds."""
        now = perf_counter()
        waiting = now - self._asked if self._asked else 0
        return max(self._health, waiting), max(self._gap, now - self._last if self._last else 0)

    async def health(self, client):
        while True:
            self._asked = perf_counter()
            (await client.get("/health")).raise_for_status()
            self._health = max(self._health, perf_counter() - self._asked)
            self._asked = None
            await asyncio.sleep(0.02)

    async def stream(self, client):
        body = {"model": "tiny", "prompt": "Once", "max_tokens": 4000, "stream": True, "ignore_eos": True}
        while True:
            self._last = None
            async with client.stream("POST", COMPLETIONS, json=body | {"temperature": 0}) as answer:
                async for _ in answer.aiter_lines():
                    now = perf_counter()
                    self._gap = max(self._gap, now - self._last if self._last else 0)
                    self._last = now


if __name__ == "__main__":
    main()
