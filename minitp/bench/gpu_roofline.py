"""The limits of a GPU: how fast its memory is read, what cuBLAS multiplies, and what an all-reduce takes.

A pass takes at least as long as a kernel that only reads its bytes, and at least as long as its products at
the rate that cuBLAS reaches in the prompt's shapes. All ranks measure at the same time, each on its own GPU
and by that GPU's clock. A copy between two arrays is measured as well: it is the figure that other projects
state, and it is less, for memory is slower when reads and writes take turns.
"""

import numpy as np

from minitp.bench.roofline import ALL_REDUCE_BYTES, Roofline, token_bytes, total_elements
from minitp.cuda.comm import LocalComm, copy
from minitp.cuda.compiler import Compiler
from minitp.cuda.kernels.read_memory import PIECE, ReadMemory

CACHES = 16  # times the L2 cache, so that reads hardly find anything in there
ROUNDS = 7
AHEAD = 40  # reads, some 10 ms: more than the host takes to launch a pass
ALL_REDUCES = 32  # timed together
MOST_ROWS = 4096  # of the products that measure arithmetic


class GpuRoofline(Roofline):
    """The limits of the ranks' GPUs.

    Attributes
    ----------
    reads : float
        Bytes a second that a kernel reads which does nothing else, of all ranks together.
    copy : float
        Bytes a second, read and written, of all ranks together.
    rate : float
        Multiplications and additions a second, of all ranks together.
    all_reduce_s : float
        What the all-reduce of a token takes on the slowest rank; 0 where there is none.
    """

    def measure(self, prompt_tokens):
        model, comm = self.model, self.model.comm
        timer, rows = Timer(model.device), min(prompt_tokens, MOST_ROWS)
        comm.allgather_object(None)
        self.reads = sum(comm.allgather_object(timer.read_rate()))
        self.copy = sum(comm.allgather_object(timer.copy_rate()))
        self.rate = sum(comm.allgather_object(matrix_rate(timer, self.layers, rows, model.device)))
        token = model.config.hidden_size * self.dtype.itemsize
        sizes = [] if isinstance(comm, LocalComm) else sorted({*ALL_REDUCE_BYTES, token})
        seconds = {n: max(comm.allgather_object(all_reduce_seconds(timer, model, n))) for n in sizes}
        self.all_reduce_s = seconds.get(token, 0.0)
        del timer
        model.device.cupy.get_default_memory_pool().free_all_blocks()  # what the model takes is seen later
        return {
            "bytes_per_token": total_elements(comm, self) * self.dtype.itemsize,
            "read_gb_per_s": self.reads / 1e9,
            "copy_gb_per_s": self.copy / 1e9,
            "bandwidth_gb_per_s": self.reads / 1e9,
            "matrix_rows": rows,
            "matrix_gflop_per_s": self.rate / 1e9,
            "all_reduce": [{"bytes": n, "us": 1e6 * s} for n, s in seconds.items()],
        }

    def seconds(self, passes):
        """By the weights alone for the products: attention's are a few percent of a prompt of 2048 tokens."""
        comm, found = self.model.comm, 0.0
        for parts, logit_rows in passes:
            rows = sum(tokens for tokens, _ in parts)
            read = self.weight_elements(1, min(logit_rows, 1)) * self.dtype.itemsize
            read += sum(self.cache_bytes(keys) for _, keys in parts)
            flops = 2 * self.weight_elements(rows, logit_rows)
            read, flops = map(sum, zip(*comm.allgather_object((read, flops)), strict=True))
            found += max(read / self.reads, flops / self.rate)
        return found

    def collective_shares(self, runs):
        """By their time alone; inside a graph nobody sees them."""
        reductions = 2 * self.model.config.num_hidden_layers + 1
        decode_s = sorted(run.decode_s for run in runs)[len(runs) // 2]
        return [reductions * self.all_reduce_s / decode_s] * len(runs[0].all_reduce_shares)

    def shares_of_bandwidth(self, keys, decode_s):
        """Return what a token reads in that time as shares of the reads' bandwidth and of the copy's."""
        speed = token_bytes(self.model.comm, self, keys) / decode_s
        return speed / self.reads, speed / self.copy

    def share_of_matrix_rate(self, tokens, prefill_s):
        """Of cuBLAS's rate, what a prompt's products with the weights are in that time."""
        return 2 * total_elements(self.model.comm, self, tokens) / prefill_s / self.rate


class Timer:
    """Times what is given to a GPU by its own clock.

    Launching takes the host longer than a small kernel takes the GPU. So some reads go before what is timed,
    and keep the GPU busy until all of it waits in the stream. (Not copies: what they leave in the L2 cache
    has still to be written, and on an H100 reads after them were 5% slower.)

    Parameters
    ----------
    gpu : Gpu
    """

    def __init__(self, gpu):
        cupy, self.gpu = gpu.cupy, gpu
        device = cupy.cuda.Device()
        free, _ = device.mem_info
        nbytes = min(CACHES * device.attributes["L2CacheSize"], free // 4) // PIECE * PIECE
        # Not zeros: memory and caches may be faster for these.
        self._arrays = cupy.arange(nbytes // 4, dtype=np.uint32), cupy.zeros(nbytes // 4, np.uint32)
        compiler = Compiler(cupy, np.dtype(np.float16))  # that kernel has no 16-bit numbers
        self._read = ReadMemory(compiler, cupy, nbytes)

    def read(self):
        """Read one array, larger than the L2 cache."""
        self._read(self._arrays[0])

    def copy(self):
        """Copy it to the other one."""
        copy(self.gpu, *self._arrays)

    def copy_rate(self):
        """Bytes a second, those read and those written."""
        return 2 * self._arrays[0].nbytes / self.seconds(self.copy)

    def read_rate(self):
        """Bytes a second of a kernel that only reads."""
        return self._arrays[0].nbytes / self.seconds(self.read)

    def stay_busy(self):
        """Give the GPU something to do while the host goes ahead."""
        for _ in range(AHEAD):
            self.read()

    def seconds(self, run, rounds=ROUNDS):
        """The least time of some rounds of what `run` gives to the GPU, after one that warms up."""
        events, times = self.events(2), []
        run()
        for _ in range(rounds):
            self.stay_busy()
            events[0].record(self.gpu.stream)
            run()
            events[1].record(self.gpu.stream)
            events[1].synchronize()
            times.append(self.between(*events))
        return min(times)

    def events(self, count):
        """Events that keep the time."""
        return [self.gpu.cupy.cuda.Event() for _ in range(count)]

    def between(self, start, end):
        """Seconds from one event to another."""
        return self.gpu.cupy.cuda.get_elapsed_time(start, end) / 1000


def matrix_rate(timer, layers, rows, gpu):
    """Multiplications and additions a second in products of [rows, in] with all layers' matrices."""
    widest = max(w.shape[0] for matrices in layers for w in matrices)
    # Random numbers: a GPU slows down for what changes many bits, and is faster for zeros.
    x = np.random.default_rng(0).standard_normal((rows, widest), np.float32)
    x = gpu.from_host(x.astype(gpu.dtype))  # [rows, widest]

    def run():
        for matrices in layers:
            for w in matrices:  # [in, out]
                gpu.xp.matmul(x[:, : w.shape[0]], w)

    elements = sum(w.size for matrices in layers for w in matrices)
    return 2 * rows * elements / timer.seconds(run)


def all_reduce_seconds(timer, model, nbytes):
    """Of one all-reduce of so many bytes in the model's dtype, when one follows another."""
    cupy, dtype, width = model.device.cupy, model.device.dtype, model.config.hidden_size
    count = max(1, nbytes // dtype.itemsize)
    x = cupy.zeros((count // width, width) if count % width == 0 else count, dtype)  # rows, as in the model
    out = cupy.empty(x.shape, dtype)

    def run():
        with model.comm.launching():
            for _ in range(ALL_REDUCES):
                model.comm.reduce_into(x, out)

    return timer.seconds(run) / ALL_REDUCES
