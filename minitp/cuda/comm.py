"""Collectives of arrays on GPUs. What is no array goes through the ranks' own Comm, on their hosts.

LocalComm    one rank: nothing to exchange
StagedComm   through the hosts' memory: slow, and possible everywhere
NcclComm     through NCCL; in `nccl`
PeerComm     through memory that the GPUs of a host can all see; in `peer`
"""

from contextlib import nullcontext
from time import perf_counter

from minitp.comm.base import Comm


class DeviceComm(Comm):
    """A Comm whose arrays are on a GPU.

    Parameters
    ----------
    host : Comm
        Of the same ranks, for everything else.
    gpu : Gpu

    Attributes
    ----------
    capturable : bool
        Whether its collectives of arrays may be part of a captured graph.
    """

    capturable = False

    def __init__(self, host, gpu):
        super().__init__(host.rank, host.size)
        self.shard_rank, self.host, self.gpu = host.shard_rank, host, gpu
        self.broadcast, self.allgather_object, self.name = host.broadcast, host.allgather_object, host.name

    def reduce_into(self, x, out):
        """The sum over all ranks of `x`, the same bits on each, into `out`, of one shape, without gaps."""
        raise NotImplementedError

    def gather_into(self, x, out):
        """`x` of rank r into out[r]; x has the same shape on all ranks, without gaps."""
        raise NotImplementedError

    def reserve(self, compiler, width):
        """What is to be summed are rows [D] of the compiler's dtype; all ranks call it, once."""

    def reduce_add_norm(self, rms_norm, partial, x, weight, h, eps, bias, out):
        """x += the sum of everybody's `partial` + bias; h = rms_norm(x) * weight; all 16-bit [B, D], [D].

        Returns whether `out` [B, D] has the sum now: it has not where all this is one launch.
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
        rows, most = len(x), max(widths)
        mine = cupy.zeros((rows, most), x.dtype)  # [T, widest]: uneven parts are padded
        mine[:, : x.shape[1]] = x
        parts = cupy.empty((self.size, rows, most), x.dtype)  # [ranks, T, widest]
        with self.launching():
            self.gather_into(mine, parts)
        joined = cupy.concatenate(
            [part[:, :width] for part, width in zip(parts, widths, strict=True)], axis=1
        )
        self.seconds += perf_counter() - started
        return joined  # [T, sum(widths)]

    def abort(self, exit_code):
        self.host.abort(exit_code)

    def launching(self):
        """A `with` block in which work with collectives is given to the GPU, outside a capture."""
        return nullcontext()

    def close(self):
        self.host.close()


class LocalComm(DeviceComm):
    """One rank, or one with the share of one of several, which computes its part and throws the rest in."""

    capturable = True

    def reduce_into(self, x, out):
        copy(self.gpu, x, out)

    def gather_into(self, x, out):
        for part in out:
            copy(self.gpu, x, part)


class StagedComm(DeviceComm):
    """Ranks that meet on their hosts, through MPI or shared memory."""

    def reduce_into(self, x, out):
        out[...] = self.gpu.from_host(self.host.all_reduce(self.gpu.to_host(x)))

    def gather_into(self, x, out):
        flat = self.gpu.to_host(x).reshape(1, -1)  # [1, n]
        everyones = self.host.all_gather(flat, [flat.size] * self.size)  # [1, ranks * n]
        out[...] = self.gpu.from_host(everyones.reshape(out.shape))


def copy(gpu, x, out):
    """x to out, both without gaps, on the GPU's stream; may be captured."""
    if x.data.ptr == out.data.ptr:
        return
    runtime = gpu.cupy.cuda.runtime
    kind = runtime.memcpyDeviceToDevice
    runtime.memcpyAsync(out.data.ptr, x.data.ptr, x.nbytes, kind, gpu.stream.ptr)
