"""Compare `minitp serve` with llama.cpp's server: many requests at once over HTTP, the same float32 weights.

    python benchmarks/server_peers.py [--requests 16] [--prompt-tokens 64] [--tokens 64] [--tp 2] [--rounds 3]

All requests are sent at the same time to /v1/completions, as random token ids, and timed until the last
response is complete. The result is new tokens per second over all requests. Both servers run at the
same time and take turns; each is idle while the other is measured. Each has a slot for every request and uses
all cores. Needs minitp[serve], an mpirun, httpx, xllamacpp (llama.cpp's server in a wheel) and gguf.
"""

import argparse
import asyncio
import random
import re
import statistics
import subprocess
import sys
import threading
from time import perf_counter, sleep

import httpx
from peers import gguf_file

from minitp.launch.run import WORKER
from minitp.util.environment import cores

URL = re.compile(r"(http://[0-9.]+:[0-9]+)")
VOCABULARY = 49152


def main():
    """Measure both servers in turn; print medians and the ratio."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--requests", type=int, default=16)
    arguments.add_argument("--prompt-tokens", type=int, default=64)
    arguments.add_argument("--tokens", type=int, default=64)
    arguments.add_argument("--tp", type=int, default=2)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--llama-cpp", action="store_true", help=argparse.SUPPRESS)  # runs its server
    args = arguments.parse_args()
    if args.llama_cpp:
        return llama_cpp(args.requests, args.prompt_tokens + args.tokens)
    minitp = [*WORKER, "serve", "--port", "0", "--tp", str(args.tp)]
    shape = ["--requests", str(args.requests), "--prompt-tokens", str(args.prompt_tokens)]
    peer = [sys.executable, __file__, "--llama-cpp", *shape, "--tokens", str(args.tokens)]
    servers = {"minitp": start(minitp), "llama.cpp": start(peer)}
    runs = {name: [] for name in servers}
    try:
        for n in range(args.rounds + 1):
            for name, (_, url) in servers.items():
                speed = asyncio.run(ask_all(url, args, seed=n))
                if n:  # the first warms up
                    runs[name].append(speed)
    finally:
        for process, _ in servers.values():
            process.terminate()
    for name, values in runs.items():
        print(f"{name:10}{statistics.median(values):8.1f} tokens/s  {min(values):.1f} to {max(values):.1f}")
    ratio = statistics.median(ours / theirs for ours, theirs in zip(*runs.values(), strict=True))
    print(f"minitp / llama.cpp: {ratio:.2f}")


def start(command):
    """Start a server; return its process, and its address once the server has printed it."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    last = ""
    for line in process.stderr:
        last = line
        if found := URL.search(line):
            threading.Thread(target=process.stderr.read, daemon=True).start()  # keeps the pipe empty
            return process, found[1]
    sys.exit(f"{' '.join(command[:4])} exited with code {process.wait()}: {last.strip()}")


async def ask_all(url, args, seed):
    """Send all requests; return new tokens per second over all of them."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(VOCABULARY) for _ in range(args.prompt_tokens)] for _ in range(args.requests)]
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        started = perf_counter()
        answers = await asyncio.gather(*[ask(client, url, prompt, args.tokens) for prompt in prompts])
        seconds = perf_counter() - started
    assert answers == [args.tokens] * args.requests, answers
    return sum(answers) / seconds


async def ask(client, url, prompt, tokens):
    """Send one request; return the number of new tokens."""
    body = {"model": "smollm2", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    answer = await client.post(f"{url}/v1/completions", json=body)
    return answer.raise_for_status().json()["usage"]["completion_tokens"]


def llama_cpp(requests, positions):
    """Run llama.cpp's server with a slot for each request, until the process is terminated."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(gguf_file(dequantized=True))
    parameters.n_parallel = requests
    parameters.n_ctx = requests * (positions + 8)
    parameters.n_gpu_layers = 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = cores()
    parameters.port = 0
    parameters.warmup = True
    server = xllamacpp.Server(parameters)
    print(server.listening_address, file=sys.stderr, flush=True)
    while True:
        sleep(60)


if __name__ == "__main__":
    main()
