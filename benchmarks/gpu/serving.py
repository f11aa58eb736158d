"""Measure many requests at once: engine COUNT, serve MODEL COUNT [COUNT ..]. The last line is JSON.

    engine   requests in the engine, next to a decode graph of as many rows at the same average context
    serve    the same requests to `minitp serve` over HTTP, as complete responses and streamed

Both count the new tokens per second of all requests together, prompts included.
"""

import json
import random
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from time import perf_counter
from urllib.parse import urlsplit

PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 64, 256, 2
URL = re.compile(r"http://[0-9.]+:[0-9]+")
WAIT_S = 600.0  # time limit for a response; the task's own limit is shorter


def engine(count, model="random:mistral-7b", prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS):
    """Measure `count` requests in the engine, and the graph's rate with as many rows."""
    from graphs import free_pools, open_rank, time_of_pass

    from minitp.bench.concurrency import engine_for, request_prompts, together_seconds
    from minitp.bench.gpu_roofline import Timer
    from minitp.cli.bench import Job

    count, prompt_tokens, new_tokens = int(count), int(prompt_tokens), int(new_tokens)
    model, keys = open_rank(model), prompt_tokens + new_tokens // 2
    timer = Timer(model.device)
    step_us = time_of_pass(model, timer, count, keys, timer.read_rate())["us"]
    free_pools(model.device)
    job = Job(prompt_tokens, new_tokens, ROUNDS, profile=False, sweep=None, requests=count)
    running, seconds = engine_for(model, count, prompt_tokens + new_tokens), []
    for seed in range(ROUNDS + 1):  # the first round captures the graphs
        seconds.append(together_seconds(running, request_prompts(model, job, seed), new_tokens))
    return {
        **sizes(count, prompt_tokens, new_tokens),
        "tokens_per_s": count * new_tokens / median(seconds[1:]),
        "graph_tokens_per_s": 1e6 * count / step_us,
    }


def serve(folder, *counts, new_tokens=NEW_TOKENS, prompt_tokens=PROMPT_TOKENS):
    """Measure concurrent requests to `minitp serve` with the model in `folder`."""
    folder = Path(folder)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    options = ["--model", str(folder), "--tp", "1", "--device", "cuda", "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "minitp", "serve", *options], stderr=subprocess.PIPE, text=True
    )
    try:
        address = wait_for_address(process)
        points = []
        for count in map(int, counts):
            point = sizes(count, prompt_tokens, new_tokens)
            for kind, stream in (("tokens_per_s", False), ("streamed_tokens_per_s", True)):
                speeds = []
                for seed in range(ROUNDS + 1):  # the first round captures the graphs
                    draw = random.Random(f"{seed} {kind}")
                    prompts = [draw.choices(range(vocabulary), k=prompt_tokens) for _ in range(count)]
                    speeds.append(rate_of(address, folder.name, prompts, new_tokens, stream))
                point[kind] = median(speeds[1:])
            points.append(point)
        return {"points": points}
    finally:
        process.terminate()
        process.wait()


def sizes(count, prompt_tokens, new_tokens):
    """Return the number of requests and their lengths, for JSON."""
    return {"requests": count, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}


def wait_for_address(process):
    """Return the (host, port) that a server prints when it is ready; keep reading its stderr afterward."""
    last = ""
    for line in process.stderr:
        last = line
        if found := URL.search(line):
            threading.Thread(target=process.stderr.read, daemon=True).start()
            address = urlsplit(found[0])
            return address.hostname, address.port
    sys.exit(f"minitp serve exited with code {process.wait()}: {last.strip()}")


def rate_of(address, model, prompts, new_tokens, stream):
    """Send all prompts at once; return the new tokens per second until the last response is complete."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        started = perf_counter()
        list(pool.map(lambda prompt: ask(address, model, prompt, new_tokens, stream), prompts))
        return len(prompts) * new_tokens / (perf_counter() - started)


def ask(address, model, prompt, new_tokens, stream):
    """Send one request and read its response; exit unless it has exactly `new_tokens` new tokens."""
    body = {"model": model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0}
    body["ignore_eos"] = True
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    connection = HTTPConnection(*address, timeout=WAIT_S)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    if response.status != 200:
        raise SystemExit(f"minitp serve returned {response.status}: {text[:200]}")
    counts = re.findall(r'"completion_tokens": ?(\d+)', text)
    if not counts or int(counts[-1]) != new_tokens:
        raise SystemExit(f"minitp serve returned {counts[-1:]} new tokens, expected {new_tokens}")


if __name__ == "__main__":
    print(json.dumps({"engine": engine, "serve": serve}[sys.argv[1]](*sys.argv[2:])))
