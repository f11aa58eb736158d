"""The host's half of loading a model to a GPU, without a GPU: the rate of GpuLoader on the tests' stand-in.

Writes layers of Mistral 7B's shape to a file (in the page cache), and in each round reads that file plainly
and loads it with the loader of the rank's slices, now and as it was: in one thread, through the safetensors
library and two buffers. The stand-in's copy to the GPU is a memcpy of the CPU; `--copy none` leaves it out,
as a GPU's own copy engine would. Prints medians of the rates, and of their ratios within a round, by the
clock and by the CPU time of all threads, which other processes hardly change.

    python benchmarks/load_host.py [--layers 4] [--rounds 5] [--tp 1] [--copy memcpy|none]
"""

import argparse
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from time import perf_counter, process_time

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/support"), str(ROOT / "benchmarks/gpu")]

from on_gpu import run_on_gpus, stand_in  # noqa: E402
from parts import write  # noqa: E402

from minitp.bench.load_rate import MOST_BYTES, read_rate  # noqa: E402
from minitp.cuda.loader import GpuLoader, padded  # noqa: E402
from minitp.loading.source import open_model  # noqa: E402
from minitp.loading.weights import shard_nbytes  # noqa: E402

BEFORE_BYTES = 1 << 24


class LoaderBefore(GpuLoader):
    """The loader as it was before there were reader threads."""

    def _matrix(self, *names):
        shapes = [self.plan.tensors[name].shape_on(self.rank) for name in names]
        rows, width = sum(out for out, _ in shapes), shapes[0][1]
        joined = self.device.cupy.empty((rows, padded(width)), dtype=self.device.dtype)  # [sum of out, >= in]
        start = 0
        for name, (out, _) in zip(names, shapes, strict=True):
            for row, block in self._blocks(name):  # [rows, in]
                self._copy(block, joined[start + row : start + row + len(block)])
            start += out
        return joined[:, :width].T

    def _copy(self, rows, out):
        runtime, width = self.device.cupy.cuda.runtime, rows.shape[1]
        if not hasattr(self, "_buffers"):
            self._turn, self._buffers = 0, [np.full(BEFORE_BYTES, 0xFF, np.uint8) for _ in range(2)]
        most = max(1, BEFORE_BYTES // out.strides[0])
        for start in range(0, len(rows), most):
            block = rows[start : start + most]
            self._turn = 1 - self._turn
            pinned = self._buffers[self._turn][: len(block) * out.strides[0]].view(out.dtype)
            pinned = pinned.reshape(len(block), -1)
            pinned[:, :width] = block
            pinned[:, width:] = 0
            target, kind = out[start:].data.ptr, runtime.memcpyHostToDevice
            runtime.memcpyAsync(target, pinned.ctypes.data, pinned.nbytes, kind, self.device.stream.ptr)


def reuse_memory(cupy):
    """Make `cupy.empty` return parts of one block that is already in memory, as a GPU's memory is."""
    block = cupy.empty(1 << 28, np.uint8)  # the largest array, an embedding, takes 262 MB

    def empty(shape, dtype=float):
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return block[:nbytes].view(dtype).reshape(shape)

    cupy.empty = empty


def measure(comm, folder, options):
    """Print the rates of each round and their medians."""
    from minitp.cuda.gpu import with_dtype

    gpu = with_dtype(comm.gpu, "bfloat16", "bfloat16")
    reuse_memory(gpu.cupy)
    if options.copy == "none":
        gpu.cupy.cuda.runtime.memcpyAsync = lambda *args: None
    source = open_model(str(folder), options.tp)
    nbytes = shard_nbytes(source.plan, 0, gpu)

    def load(loader):
        loader(source.plan, 0, source.tensors, gpu).load()
        return nbytes

    def read():
        return read_rate(folder / "model.safetensors") and file_bytes

    file_bytes = min(MOST_BYTES, (folder / "model.safetensors").stat().st_size)
    works = {"file": read, "before": partial(load, LoaderBefore), "now": partial(load, GpuLoader)}
    rounds = [{name: rates(work) for name, work in works.items()} for _ in range(options.rounds + 1)][1:]
    for n, clock in enumerate(("by the clock", "by CPU time")):
        print(clock)
        for name in works:
            values = [results[name][n] for results in rounds]
            print(
                f"  {name:6} {statistics.median(values):6.2f} GB/s  ({min(values):.2f} to {max(values):.2f})"
            )
        for a, b in (("before", "file"), ("now", "file"), ("now", "before")):
            ratio = statistics.median(results[a][n] / results[b][n] for results in rounds)
            print(f"  {a} / {b}: {ratio:.2f}")


def rates(work):
    """Return the GB/s of work(), which returns a number of bytes, by the clock and by CPU time."""
    clock, cpu = perf_counter(), process_time()
    nbytes = work()
    return nbytes / (perf_counter() - clock) / 1e9, nbytes / (process_time() - cpu) / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tp", type=int, default=1, help="load the first rank's slices of this many")
    parser.add_argument("--copy", choices=("memcpy", "none"), default="memcpy")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="minitp-load-") as folder, stand_in():
        write(folder, layers=options.layers)
        run_on_gpus(1, lambda comm: measure(comm, Path(folder), options))


if __name__ == "__main__":
    main()
