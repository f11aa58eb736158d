"""The limits of a GPU: its read bandwidth, the matrix rate of cuBLAS, and the time of an all-reduce.

A pass takes at least as long as a kernel that only reads its bytes, and at least as long as its products at
the rate that cuBLAS reaches in the prompt's shapes. All ranks measure at the same time, each on its own GPU
and by that GPU's clock. A copy between two arrays is measured as well, because other projects report that
figure. It is lower, since memory is slower when reads and writes alternate.
"""

import numpy as np

from minitp.bench.roofline import ALL_REDUCE_BYTES, Roofline, token_bytes, total_elements
from minitp.cuda.comm import LocalComm, copy
from minitp.cuda.compiler import Compiler
from minitp.cuda.kernels.read_memory import PIECE, ReadMemory

CACHES = 16  # size of an array in multiples of the L2 cache, so that reads rarely hit the cache
ROUNDS = 7
AHEAD = 40  # number of reads that take about 10 ms, longer than the host takes to launch a pass
ALL_REDUCES = 32  # number of all-reduces timed together
MOST_ROWS = 4096  # maximum number of rows of the products that measure arithmetic


class GpuRoofline(Roofline):
    """The limits of the ranks' GPUs.

    Attributes
    ----------
    reads : float
        Bytes per second of a kernel that only reads, summed over all ranks.
    copy : float
        Bytes read and written per second by a copy, summed over all ranks.
    rate : float
        FLOP/s of matrix products, summed over all ranks.
    all_reduce_s : float
        Seconds of a token's all-reduce on the slowest rank; 0 if there is none.
    """

    def measure(self, prompt_tokens):
        model, comm = self.model, self.model.comm
        timer, rows = Timer(model.device), min(prompt_tokens, MOST_ROWS)
        comm.allgather_object(None)
        self.reads = sum(comm.allgather_object(timer.read_rate()))
        self.copy = sum(comm.allgather_object(timer.copy_rate()))
        self.rate = sum(comm.allgather_object(matrix_rate(timer, self, rows)))
        token = model.config.hidden_size * self.dtype.itemsize
        sizes = [] if isinstance(comm, LocalComm) else sorted({*ALL_REDUCE_BYTES, token})
        seconds = {n: max(comm.allgather_object(all_reduce_seconds(timer, model, n))) for n in sizes}
        self.all_reduce_s = seconds.get(token, 0.0)
        del timer
        model.device.cupy.get_default_memory_pool().free_all_blocks()  # not part of the model's peak
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
        """Return the minimum time of a list of passes, like Roofline.seconds.

        Only the FLOPs of the weights are counted; attention adds a few percent in a prompt of 2048 tokens.
        """
        comm, total = self.model.comm, 0.0
        for parts, logit_rows in passes:
            rows = sum(tokens for tokens, _ in parts)
            read = self.read(rows, logit_rows) * self.dtype.itemsize
            read += sum(self.cache_bytes(keys) for _, keys in parts)
            flops = 2 * self.multiplied(rows, logit_rows)
            read, flops = map(sum, zip(*comm.allgather_object((read, flops)), strict=True))
            total += max(read / self.reads, flops / self.rate)
        return total

    def collective_shares(self, rounds):
        """Estimate the shares from the time of an all-reduce alone; inside a graph it cannot be timed."""
        reductions = 2 * self.model.config.num_hidden_layers + 1
        decode_s = sorted(one.decode_s for one in rounds)[len(rounds) // 2]
        return [reductions * self.all_reduce_s / decode_s] * len(rounds[0].all_reduce_shares)

    def shares_of_bandwidth(self, keys, decode_s):
        """Return a token's read rate as a share of the read bandwidth and of the copy bandwidth."""
        speed = token_bytes(self.model.comm, self, keys) / decode_s
        return speed / self.reads, speed / self.copy

    def share_of_matrix_rate(self, tokens, prefill_s):
        """Return the FLOP/s of a prompt's products with the weights, as a share of cuBLAS's rate."""
        return 2 * total_elements(self.model.comm, self, tokens) / prefill_s / self.rate


class Timer:
    """A timer of work on a GPU, by the GPU's own clock.

    Launching a small kernel takes the host longer than running it takes the GPU. So some reads are launched
    first, which keep the GPU busy until all timed work is queued on the stream. (Copies would leave data in
    the L2 cache that has yet to be written; on an H100, reads after them were 5% slower.)

    Parameters
    ----------
    gpu : Gpu
    """

    def __init__(self, gpu):
        cupy, self.gpu = gpu.cupy, gpu
        device = cupy.cuda.Device()
        free, _ = device.mem_info
        nbytes = min(CACHES * device.attributes["L2CacheSize"], free // 4) // PIECE * PIECE
        # The source is not zeros, for which memory and caches may be faster.
        self._arrays = cupy.arange(nbytes // 4, dtype=np.uint32), cupy.zeros(nbytes // 4, np.uint32)
        compiler = Compiler(cupy, np.dtype(np.float16))  # any dtype: the kernel has no 16-bit numbers
        self._read = ReadMemory(compiler, cupy, nbytes)

    def read(self):
        """Read one array, larger than the L2 cache."""
        self._read(self._arrays[0])

    def copy(self):
        """Copy one array to the other."""
        copy(self.gpu, *self._arrays)

    def copy_rate(self):
        """Return the bytes per second of a copy, counting both reads and writes."""
        return 2 * self._arrays[0].nbytes / self.seconds(self.copy)

    def read_rate(self):
        """Return the bytes per second of a kernel that only reads."""
        return self._arrays[0].nbytes / self.seconds(self.read)

    def stay_busy(self):
        """Keep the GPU busy while the host launches what is to be timed."""
        for _ in range(AHEAD):
            self.read()

    def seconds(self, launch, rounds=ROUNDS):
        """Return the minimum time in seconds of the GPU work that `launch` starts, after a warm-up."""
        events, times = self.events(2), []
        launch()
        for _ in range(rounds):
            self.stay_busy()
            events[0].record(self.gpu.stream)
            launch()
            events[1].record(self.gpu.stream)
            events[1].synchronize()
            times.append(self.between(*events))
        return min(times)

    def events(self, count):
        """Return new events that record the time."""
        return [self.gpu.cupy.cuda.Event() for _ in range(count)]

    def between(self, start, end):
        """Return the seconds from one event to another."""
        return self.gpu.cupy.cuda.get_elapsed_time(start, end) / 1000


def matrix_rate(timer, roofline, rows):
    """Return the FLOP/s of the products of all layers in a pass over `rows` tokens."""
    gpu = roofline.model.device
    products = [product for layer in roofline.layers for product in roofline.products(layer, rows)]
    widest = max(w.shape[0] for _, w in products)
    # Random numbers, because a GPU is faster for zeros and slower for numbers that flip many bits.
    x = np.random.default_rng(0).standard_normal((rows, widest), np.float32)
    x = gpu.from_host(x.astype(gpu.dtype))  # [rows, widest]

    def launch():
        for n, w in products:  # [in, out]
            gpu.xp.matmul(x[:n, : w.shape[0]], w)

    return 2 * roofline.multiplied(rows, logit_rows=0) / timer.seconds(launch)


def all_reduce_seconds(timer, model, nbytes):
    """Return the time in seconds of an all-reduce of `nbytes` in the model's dtype, within a series."""
    cupy, dtype, width = model.device.cupy, model.device.dtype, model.config.hidden_size
    count = max(1, nbytes // dtype.itemsize)
    x = cupy.zeros((count // width, width) if count % width == 0 else count, dtype)  # rows, as in the model
    out = cupy.empty(x.shape, dtype)

    def launch():
        with model.comm.launching():
            for _ in range(ALL_REDUCES):
                model.comm.reduce_into(x, out)

    return timer.seconds(launch) / ALL_REDUCES
