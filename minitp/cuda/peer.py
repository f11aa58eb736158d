"""All-reduces of few rows through memory that all GPUs of a host can read; all other collectives use NCCL.

One token of Mistral 7B needs 65 all-reduces of 8 KiB per rank. On 4 GPUs, NCCL's latency would take about as
long as reading a rank's weights. `all_reduce.cu` is a single launch: it writes the rank's part to its own
memory, reads the other ranks' parts over the links, adds them in rank order, and continues with the residual
addition and the norm.
"""

from contextlib import contextmanager

import numpy as np

from minitp.cuda.kernels.all_reduce import AllReduce, region_bytes
from minitp.cuda.kernels.linear import MAX_TOKENS
from minitp.cuda.nccl import PATIENCE_S, NcclComm
from minitp.errors import AgreedError, RankError


class PeerComm(NcclComm):
    """Collectives between ranks on one host with one GPU each, which can read each other's memory.

    Parameters
    ----------
    host, gpu, patience_s, auto
        The same as for NcclComm.
    """

    def __init__(self, host, gpu, patience_s=PATIENCE_S, auto=False):
        super().__init__(host, gpu, patience_s, auto)
        self._patience_s = patience_s
        self._peer = self._opened = None

    @property
    def transport(self):
        return "nccl" if self._peer is None else "peer"

    def reserve(self, compiler, width):
        """Map all ranks' memory for sums of up to MAX_TOKENS rows; see `DeviceComm.reserve`."""
        candidates, failed = {}, {}
        try:
            self._map(compiler, width)
        except AgreedError as error:
            if not self._auto:
                raise
            failed["peer"] = str(error)
        if not self._auto:
            return self
        if self._peer is not None:
            candidates["peer"] = self, self._peer
        chosen = self._fastest(self.gpu.cupy.zeros((1, width), compiler.dtype), candidates, failed)
        if self.choice.name != "peer":
            self._peer = None
        return chosen

    def _map(self, compiler, width):
        import cupyx

        cupy, peer = self.gpu.cupy, None
        with self.host.agreed():
            self._region = cupy.cuda.runtime.malloc(region_bytes(self.size, MAX_TOKENS, width))
            cupy.cuda.runtime.memsetAsync(
                self._region, 0, region_bytes(self.size, MAX_TOKENS, width), self.gpu.stream.ptr
            )
            self.gpu.stream.synchronize()
            handle = cupy.cuda.runtime.ipcGetMemHandle(self._region)
        handles = self.host.allgather_object(handle)
        with self.host.agreed():
            self._opened = [
                self._region if rank == self.rank else cupy.cuda.runtime.ipcOpenMemHandle(handle)
                for rank, handle in enumerate(handles)
            ]
            regions = cupy.asarray(np.array(self._opened, np.uint64))  # [ranks]
            calls = cupy.zeros(MAX_TOKENS, np.uint64)
            self._missing, self._seen = cupy.zeros(1, np.int32), cupyx.empty_pinned(1, np.int32)
            self._seen[0] = 0
            peer = AllReduce(compiler, self.rank, regions, calls, self._missing, width, self._patience_s)
        self._width, self._peer = width, peer  # only if no rank has failed

    def reduce_into(self, x, out):
        if self._fits(x):
            self._peer(x, out)
        else:
            super().reduce_into(x, out)

    def reduce_add_norm(self, rms_norm, partial, x, weight, h, eps, bias, out):
        if self._fits(partial):
            self._peer.add_and_norm(partial, x, weight, h, eps, bias)
            return False
        return super().reduce_add_norm(rms_norm, partial, x, weight, h, eps, bias, out)

    @contextmanager
    def launching(self):
        """Let the GPU copy the number of a missing rank to the host once the work is done."""
        with super().launching():
            yield
            if self._peer is not None:
                runtime, kind = self.gpu.cupy.cuda.runtime, self.gpu.cupy.cuda.runtime.memcpyDeviceToHost
                missing = self._missing.data.ptr
                runtime.memcpyAsync(self._seen.ctypes.data, missing, 4, kind, self.gpu.stream.ptr)

    def check(self):
        super().check()
        if self._peer is not None and (rank := int(self._seen[0])):
            self._peer = None
            raise RankError(
                f"stuck in an all-reduce for {self._patience_s:g} s: rank {rank - 1} did not arrive"
            )

    def close(self):
        self.gpu.stream.synchronize()
        self.host.allgather_object(None)  # no rank reads another rank's memory anymore
        runtime = self.gpu.cupy.cuda.runtime
        for rank, region in enumerate(self._opened or []):
            if rank != self.rank:
                runtime.ipcCloseMemHandle(region)
        self.host.allgather_object(None)
        if self._opened:
            runtime.free(self._region)
        super().close()

    def _fits(self, x):
        return self._peer is not None and x.ndim == 2 and len(x) <= MAX_TOKENS and x.shape[1] == self._width


def peers_reach_each_other(host, gpu, local_rank):
    """Return whether each rank's GPU can read the memory of every other rank's, in all replica groups."""
    runtime, own = gpu.cupy.cuda.runtime, gpu.cupy.cuda.Device().id
    ranks = host.allgather_object((own, local_rank))
    one_host = len({local for _, local in ranks}) == host.size  # on several hosts, local ranks repeat
    own_gpu = len({device for device, _ in ranks}) == host.size
    reach = all(device == own or runtime.deviceCanAccessPeer(own, device) for device, _ in ranks)
    return all(host.all_groups.allgather_object(bool(one_host and own_gpu and reach)))
