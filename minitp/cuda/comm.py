"""Collectives of GPU arrays; Python objects go through the Comm of the ranks' hosts.

LocalComm    one rank: nothing to exchange
StagedComm   through the hosts' memory: slow, but works everywhere
NcclComm     through NCCL (nccl.py)
PeerComm     through memory that all GPUs of a host can read (peer.py)
"""

from contextlib import nullcontext
from time import perf_counter

from minitp.comm.base import Comm


class DeviceComm(Comm):
    """A Comm whose arrays are on a GPU.

    Parameters
    ----------
    host : Comm
        A Comm of the same ranks on the CPU, for everything that is not a GPU array.
    gpu : Gpu

    Attributes
    ----------
    capturable : bool
        Whether collectives of arrays may be part of a captured graph.
    transport : str or None
        The value of --comm that selects this transport; None if there is a single rank.
    choice : cuda.choice.TransportChoice or None
        The measurements of --comm auto, if it has made any.
    """

    capturable = False
    transport = choice = None

    def __init__(self, host, gpu):
        super().__init__(host.rank, host.size)
        self.shard_rank, self.host, self.gpu = host.shard_rank, host, gpu
        self.broadcast, self.allgather_object, self.name = host.broadcast, host.allgather_object, host.name
        self.agree, self.all_groups = host.agree, host.all_groups

    def reduce_into(self, x, out):
        """Write the sum of all ranks' `x` into `out`, with the same bits on all; both are contiguous."""
        raise NotImplementedError

    def gather_into(self, x, out):
        """Write the `x` of each rank r into out[r]; `x` is contiguous and has the same shape on all ranks."""
        raise NotImplementedError

    def reserve(self, compiler, width):
        """Prepare for sums of rows of `width` elements of the compiler's dtype; all ranks call this once.

        The result is the Comm to use from then on: this one, or another that --comm auto found to be faster.
        It is closed with this one.
        """
        return self

    def reduce_add_norm(self, rms_norm, partial, x, weight, h, eps, bias, out):
        """Compute x += all_reduce(partial) + bias and h = rms_norm(x) * weight.

        All arrays are 16-bit: `partial`, `x`, `h` and `out` [B, D], `weight` and `bias` [D]. The result says
        whether `out` now contains the sum; it does not if a single launch computes everything.
        """
        self.reduce_into(partial, out)
        rms_norm(x, weight, h, eps, out, bias)
        return True

    def all_reduce(self, x):
        started = perf_counter()
        out = self.gpu.cupy.empty(x.shape, x.dtype)
        with self.launching():
            self.reduce_into(self.gpu.cupy.ascontiguousarray(x), out)
        self.seconds += perf_counter() - started
        return out

    def all_gather(self, x, widths):
        started, cupy = perf_counter(), self.gpu.cupy
        rows, widest = len(x), max(widths)
        padded = cupy.zeros((rows, widest), x.dtype)  # [T, widest]: all parts must have the same size
        padded[:, : x.shape[1]] = x
        parts = cupy.empty((self.size, rows, widest), x.dtype)  # [ranks, T, widest]
        with self.launching():
            self.gather_into(padded, parts)
        joined = cupy.concatenate(
            [part[:, :width] for part, width in zip(parts, widths, strict=True)], axis=1
        )
        self.seconds += perf_counter() - started
        return joined  # [T, sum(widths)]

    def abort(self, exit_code):
        self.host.abort(exit_code)

    def launching(self):
        """Return a context manager for launching work that contains collectives, outside a capture."""
        return nullcontext()

    def close(self):
        self.host.close()


class LocalComm(DeviceComm):
    """A Comm of a single rank; with ShardOnly on the host, that rank computes one shard of several."""

    capturable = True

    def reduce_into(self, x, out):
        copy(self.gpu, x, out)

    def gather_into(self, x, out):
        for part in out:
            copy(self.gpu, x, part)


class StagedComm(DeviceComm):
    """Collectives through the hosts' memory: copy to the host, use its Comm, copy back."""

    def __init__(self, host, gpu):
        super().__init__(host, gpu)
        self.transport = host.transport

    def reduce_into(self, x, out):
        out[...] = self.gpu.from_host(self.host.all_reduce(self.gpu.to_host(x)))

    def gather_into(self, x, out):
        flat = self.gpu.to_host(x).reshape(1, -1)  # [1, n]
        gathered = self.host.all_gather(flat, [flat.size] * self.size)  # [1, ranks * n]
        out[...] = self.gpu.from_host(gathered.reshape(out.shape))


def in_turn(comm, compile_kernels):
    """Compile kernels on rank 0 first; then the other ranks find them in CuPy's cache."""
    if comm.rank != 0:
        comm.allgather_object(None)
    compile_kernels()
    if comm.rank == 0:
        comm.allgather_object(None)
    comm.allgather_object(None)


def captured(gpu, run):
    """Capture what run() launches on the GPU's stream, and return the graph; end the capture if it fails."""
    gpu.stream.begin_capture()
    try:
        run()
    finally:
        graph = gpu.stream.end_capture()
    return graph


def copy(gpu, x, out):
    """Copy x to out, both contiguous, on the GPU's stream; the copy may be captured."""
    if x.data.ptr == out.data.ptr:
        return
    runtime = gpu.cupy.cuda.runtime
    kind = runtime.memcpyDeviceToDevice
    runtime.memcpyAsync(out.data.ptr, x.data.ptr, x.nbytes, kind, gpu.stream.ptr)
