"""Measure the time that an engine on a GPU needs on its host per batch: scheduling, launches, text, messages.

    python benchmarks/engine_host.py [--requests 16] [--tokens 200] [--rounds 5] [--profile] [sampling ..]

No GPU is needed: CuPy is the stand-in of the tests, whose kernels do nothing here, so that only the host's
Python is left. CuPy's own calls are NumPy's, which are cheaper; their number per batch is printed, too. The
model has two small layers, and the vocabulary and tokenizer of the demo model. Batches in which all requests
decode are timed, for an engine alone and with the message loop of `minitp serve`.
"""

import argparse
import cProfile
import json
import pstats
import queue
import random
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

import numpy as np

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS / "support"), str(TESTS), str(TESTS / "cuda_stand_in")]

import cupy  # noqa: E402
from on_gpu import model_on_gpu, run_on_gpus  # noqa: E402
from tiny import write_tiny  # noqa: E402

from minitp.engine.engine import Engine  # noqa: E402
from minitp.engine.service import RequestLoop  # noqa: E402
from minitp.loading.source import open_model  # noqa: E402
from minitp.request import Request  # noqa: E402

PROMPT_TOKENS = 64
BLOCK_SIZE = 16


def main():
    """Measure all rounds; print medians and the calls of the stand-in's GPU."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--requests", type=int, default=16)
    arguments.add_argument("--tokens", type=int, default=200)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--temperature", type=float, default=0.0)
    arguments.add_argument("--logprobs", type=int)
    arguments.add_argument("--repetition-penalty", type=float, default=1.0)
    arguments.add_argument("--profile", action="store_true", help="print where the time goes")
    args = arguments.parse_args()
    vocabulary = 49152
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"max_position_embeddings": 2048, "num_hidden_layers": 2, "vocab_size": vocabulary}
        directory = write_tiny(Path(folder) / "model", tokenizer=False, **sizes)
        run_on_gpus(1, lambda comm: measure(model_on_gpu(directory, comm), args))


def measure(model, args):
    """Measure an engine of one rank with and without the message loop."""
    calls = stop_kernels()
    tokenizer = open_model("smollm2", 1).tokenizer()
    blocks = args.requests * -(-(PROMPT_TOKENS + args.tokens) // BLOCK_SIZE)
    engine = Engine(model, blocks, BLOCK_SIZE, max_sequences=args.requests)
    profile = cProfile.Profile() if args.profile else None
    for name in ("engine", "engine and messages"):
        medians = []
        for n in range(args.rounds + 1):
            calls.clear()
            times = run_round(engine, tokenizer, args, n, name != "engine", profile if n else None)
            medians.append(1e3 * statistics.median(times))
        medians = medians[1:]  # the first captures graphs
        print(
            f"{name}: {statistics.median(medians):.3f} ms per batch of {args.requests}, "
            f"{min(medians):.3f} to {max(medians):.3f} in {args.rounds} rounds of {len(times)} batches"
        )
        per_batch = {call: round(count / (args.tokens + 4), 1) for call, count in calls.items()}
        print(f"  CuPy's calls per batch: {per_batch}")
        if profile:
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)
            profile = cProfile.Profile()


def run_round(engine, tokenizer, args, seed, messages, profile):
    """Run all requests; return the seconds of each batch in which all of them decoded."""
    draw = random.Random(seed)
    params = dict(max_new_tokens=args.tokens, ignore_eos=True, temperature=args.temperature)
    params |= dict(logprobs=args.logprobs, repetition_penalty=args.repetition_penalty)
    inbox, context = queue.SimpleQueue(), PROMPT_TOKENS + args.tokens

    def send(message):
        json.dumps(message)

    def make_request(prompt_ids, params):
        return Request(params, (), prompt_ids, context, tokenizer)

    loop = RequestLoop(engine, SimpleNamespace(inbox=inbox, send=send), make_request)
    for number in range(args.requests):
        prompt = [draw.randrange(100, 49000) for _ in range(PROMPT_TOKENS)]
        inbox.put({"add": number, "prompt_ids": prompt, "params": params})
    while not inbox.empty():  # `handle_messages` stops after a while
        loop.handle_messages()
    times = []
    while True:
        started = perf_counter()
        if profile and len(times) > 5:
            profile.enable()
        advanced = engine.run_batch()
        if messages and advanced is not None:
            loop.report(advanced)
            loop.handle_messages()
        if profile:
            profile.disable()
        seconds = perf_counter() - started
        if advanced is None:
            return times[3:]
        if not messages:  # so that the loop forgets the requests
            for request in advanced:
                if request.finish_reason is not None:
                    loop.report([request])
        if len(advanced) == args.requests:
            times.append(seconds)
            for graph in engine.pool.graphs.values():  # kernels do nothing, so tokens are made up
                graph.results[0] = cupy.asarray(np.full(graph.batch, 1000.0 + len(times)))


def stop_kernels():
    """Let kernels and graphs do nothing; return a Counter of the calls that a GPU's host would make."""
    calls = Counter()

    def counted(owner, name, replacement=None):
        original = getattr(owner, name)

        def call(*args, **options):
            calls[name] += 1
            return (replacement or original)(*args, **options)

        setattr(owner, name, call)

    counted(cupy._Function, "__call__", lambda *args, **options: None)
    counted(cupy.cuda.Graph, "launch", lambda *args: None)
    counted(cupy.cuda.runtime, "memcpyAsync")
    counted(cupy.cuda.Event, "record")
    counted(cupy.cuda.Event, "synchronize")
    counted(cupy, "asarray")
    return calls


if __name__ == "__main__":
    main()
