"""Decode speed at several numbers of ranks, beside this machine's limit.

    python benchmarks/decode.py [--model smollm2] [--tp 1 2 4] [--tokens 100] [--rounds 3] [--no-cache]
                                [-o FILE.json]

For each TP it runs in turn, `rounds` times, and prints medians:

- `bare`: only the matrix products of one token, in the same shapes, on as many processes at once: what the
  memory of this machine allows,
- `minitp`: the command itself, `minitp generate --json`,
- with --no-cache, `minitp no cache`: the same with --no-kv-cache.

Machines are noisy, so what counts is the ratio within one run. Other engines: peers.py. Results go to stdout
as a table, and to a JSON file with -o.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter

from minitp.environment import cores, limit_blas_threads
from minitp.launch import find_mpirun

PROMPT = "504,3575,282,4649,314"  # to the demo model: The capital of France is


def main():
    """Run all, print a table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--model", default="smollm2")
    arguments.add_argument("--tp", type=int, nargs="+", default=[1, 2, 4])
    arguments.add_argument("--tokens", type=int, default=100)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--no-cache", action="store_true")
    arguments.add_argument("-o", metavar="FILE.json")
    arguments.add_argument("--bare-rank", type=int, help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.bare_rank is not None:
        return bare_products(args.model, args.tokens)
    kinds = ["bare", "minitp", "minitp no cache"] if args.no_cache else ["bare", "minitp"]
    figures = {f"{kind} tp={tp}": [] for tp in args.tp for kind in kinds}
    for _ in range(args.rounds):
        for name, values in figures.items():
            values.append(measure(name, args.model, args.tokens))
    table(figures)
    if args.o:
        result = {
            "machine": platform.processor() or platform.machine(),
            "cores": cores(),
            "tokens": args.tokens,
        }
        Path(args.o).write_text(json.dumps({**result, "tokens_per_s": figures}, indent=2) + "\n")


def measure(name, model, tokens):
    """Tokens a second of one run."""
    kind, tp = name.split(" tp=")
    if kind != "bare":
        command = [sys.executable, "-m", "minitp", "generate", "--model", model, "--tokens", PROMPT]
        command += ["--ignore-eos", "--json"]
        if kind == "minitp no cache":
            command.append("--no-kv-cache")
        done = run([*command, "-n", str(tokens), "--tp", tp], dict(os.environ))
        return json.loads(done)["stats"]["decode_tokens_per_s"]
    environment = dict(os.environ)
    limit_blas_threads(environment, int(tp))
    this = [sys.executable, __file__, "--bare-rank", "0", "--model", model, "--tokens", str(tokens)]
    return float(run([find_mpirun(), "-n", tp, *this], environment))


def run(command, environment):
    """Standard output of a command that must succeed."""
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout


def bare_products(model, tokens):
    """As one of several ranks at once: only the products of a token; rank 0 prints tokens a second."""
    import numpy as np
    from mpi4py import MPI

    from minitp.device import open_device
    from minitp.model_source import open_model
    from minitp.weights import Loader

    world = MPI.COMM_WORLD
    source = open_model(model, world.size)
    weights = Loader(source.plan, world.rank, source.tensors, open_device("float32")).load()
    matrices = [m for w in weights.layers for m in (w.w_qkv, w.w_o, w.w_gate_up, w.w_down)] + [
        weights.lm_head
    ]
    rows = {m.shape[0]: np.ones((1, m.shape[0]), np.float32) for m in matrices}
    world.Barrier()
    started = perf_counter()
    for _ in range(tokens):
        for matrix in matrices:
            rows[matrix.shape[0]] @ matrix
    world.Barrier()
    if world.rank == 0:
        print(tokens / (perf_counter() - started))


def table(figures):
    """Medians, and how much of the bare products' speed minitp reaches."""
    print(f"{'':21}{'tokens/s':>9}{'min':>8}{'max':>8}")
    for name, values in figures.items():
        row = f"{name:21}{statistics.median(values):9.1f}{min(values):8.1f}{max(values):8.1f}"
        if name.startswith("minitp tp="):
            pairs = zip(values, figures[name.replace("minitp", "bare")], strict=True)
            row += f"   {statistics.median(mine / bare for mine, bare in pairs):.0%} of the bare products"
        print(row)


if __name__ == "__main__":
    main()
