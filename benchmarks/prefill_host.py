"""The host's time for a prompt on the fused path, without a GPU: kernels and cuBLAS do nothing.

Runs a model with 32 small layers on the tests' stand-in for CuPy, so what is measured is Python: the calls
that a pass makes, not what CuPy adds to each of them. It is CPU time, which other processes hardly change.
With `--before`, another checkout of this repository is measured in turn, and the ratio printed is the median
of those within a round.

    python benchmarks/prefill_host.py [--before CHECKOUT] [--rounds 5] [--tokens 32 128 512]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import cached_property
from pathlib import Path
from time import process_time
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
LAYERS, WARM_UP, PASSES = 32, 5, 30
SHAPE = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": LAYERS}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


class Nothing:
    """A replacement for a module of kernels whose launches do nothing."""

    def __init__(self, *args, **options):
        pass

    def get_function(self, name):
        return NoKernel()


class NoKernel:
    """A kernel that does nothing, launched through CuPy or through the driver."""

    kernel = SimpleNamespace(ptr=0)

    def __call__(self, *args, **options):
        pass


def silence(cupy):
    """Make kernels, cuBLAS and graphs do nothing, and new memory as cheap as CuPy's pool makes it."""
    import numpy as np
    from cupy_backends.cuda.libs import cublas

    def empty(shape, dtype=float):
        return np.empty(shape, dtype).view(cupy.ndarray)

    def zeros(shape, dtype=float):
        return np.zeros(shape, dtype).view(cupy.ndarray)

    cupy.RawModule, cupy.empty, cupy.zeros = Nothing, empty, zeros
    cublas.gemmEx = lambda *args: None
    cupy.cuda.Graph.launch = lambda graph, stream: None
    if hasattr(cupy.cuda, "driver"):  # older checkouts launch all kernels through CuPy
        cupy.cuda.driver.cuLaunchKernelEx = lambda *args: 0
    cupy.ndarray.data = pointer = cached_property(cupy.ndarray.data.fget)  # as fast as CuPy's attribute
    pointer.__set_name__(cupy.ndarray, "data")


def measure(counts):
    """Return {number of tokens: median microseconds of a pass} of the checkout that is first in sys.path."""
    from on_gpu import model_on_gpu, run_on_gpus, stand_in
    from tiny import write_tiny

    def rank(comm):
        model, found = model_on_gpu(folder, comm, path="fused"), {}
        cache = model.new_cache(max(counts))
        for count in counts:
            times, tokens = [], [n % SHAPE["vocab_size"] for n in range(count)]
            for _ in range(WARM_UP + PASSES):
                cache.length, started = 0, process_time()
                model.forward(tokens, cache, slice(-1, None))
                times.append(process_time() - started)
            found[count] = 1e6 * statistics.median(times[WARM_UP:])
        return found

    with tempfile.TemporaryDirectory() as folder, stand_in() as cupy:
        write_tiny(folder, tokenizer=False, max_position_embeddings=max(counts), **SHAPE)
        silence(cupy)
        return run_on_gpus(1, rank)[0]


def measured(root, counts):
    """Measure a checkout in a process of its own."""
    paths = [str(root), str(root / "tests"), str(root / "tests/support")]
    command = [sys.executable, __file__, "--this", "--tokens", *map(str, counts)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, cwd=root, check=True, text=True)
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="another checkout, to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--this", action="store_true", help="measure this process's checkout once")
    options = parser.parse_args()
    if options.this:
        print(json.dumps(measure(options.tokens)))
        return
    roots = [ROOT, *([options.before.resolve()] if options.before else [])]
    rounds = [[measured(root, options.tokens) for root in roots] for _ in range(options.rounds)]
    for count in map(str, options.tokens):
        us = [statistics.median(results[n][count] for results in rounds) for n in range(len(roots))]
        words = f"{count:>5} tokens: {us[0]:7.0f} us a pass, {us[0] / LAYERS:5.1f} us a layer"
        if options.before:
            ratio = statistics.median(before[count] / now[count] for now, before in rounds)
            words += f"; before {us[1]:7.0f} us, {us[1] / LAYERS:5.1f} us a layer, {ratio:.1f} times as much"
        print(words)


if __name__ == "__main__":
    main()
