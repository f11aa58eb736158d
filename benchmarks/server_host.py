"""Measure the processor time per token of `minitp serve`: its own process, next to that of rank 0.

    python benchmarks/server_host.py [--requests 16] [--tokens 300] [--rounds 3] [--no-stream]

The model is tiny and has the demo model's tokenizer, so rank 0's time is mostly the engine's, not that of
matrix products. The two processes run at the same time: the server slows the engine down only if it needs
longer for a batch's tokens than the batch takes. Needs minitp[serve].
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from server_floods import address_of, write_model

PROMPT_TOKENS = 64
TICK = os.sysconf("SC_CLK_TCK")


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--requests", type=int, default=16)
    arguments.add_argument("--tokens", type=int, default=300)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--no-stream", dest="stream", action="store_false")
    args = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "tiny", 2048)
        command = [sys.executable, "-m", "minitp", "serve", "--model", f"{folder}/tiny", "--port", "0"]
        limit = ["--tp", "1", "--max-sequences", str(args.requests)]
        process = subprocess.Popen([*command, *limit], stderr=subprocess.PIPE, text=True)
        try:
            address = address_of(process)
            rounds = [one_round(process.pid, address, args, seed) for seed in range(args.rounds + 1)][1:]
        finally:
            process.terminate()
            process.wait()
    for name, column in zip(("server", "rank 0", "wall"), zip(*rounds, strict=True), strict=True):
        print(f"{name:8}{1e6 * statistics.median(column):7.1f} us per token, "
              f"{1e6 * min(column):.1f} to {1e6 * max(column):.1f}")  # fmt: skip


def one_round(pid, address, args, seed):
    """Return the seconds per token of the server's process, of its children, and of the clock."""
    before, started = times_of(pid), perf_counter()
    asyncio.run(ask_all(address, args, seed))
    seconds, tokens = perf_counter() - started, args.requests * args.tokens
    used = [after - earlier for after, earlier in zip(times_of(pid), before, strict=True)]
    return [value / tokens for value in (*used, seconds)]


def times_of(pid):
    """Return the processor time of a process and of all its descendants, in seconds."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return own_time(pid), sum(sum(times_of(int(child))) for child in children)


def own_time(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


async def ask_all(address, args, seed):
    draw = random.Random(seed)
    prompts = [[draw.randrange(49152) for _ in range(PROMPT_TOKENS)] for _ in range(args.requests)]
    await asyncio.gather(*[ask(address, prompt, args) for prompt in prompts])


async def ask(address, prompt, args):
    """Send one request and read its answer to the end, with little work for this process."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": args.tokens, "ignore_eos": True}
    text = json.dumps(body | {"stream": args.stream, "temperature": 0})
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n"
    writer.write(
        f"{head}Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode()
    )
    answer = await reader.read(-1)
    writer.close()
    assert answer.startswith(b"HTTP/1.1 200"), answer[:300]


if __name__ == "__main__":
    main()
