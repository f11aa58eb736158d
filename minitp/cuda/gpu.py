"""A rank's GPU."""

import platform
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minitp.cuda.arrays import Arrays
from minitp.device import DTYPES, Device
from minitp.errors import InputError, RankError, one_line

EXTRA = "pip install 'minitp[cuda12]' (or cuda13, for a driver of CUDA 13)"
CACHE_SHARE = 0.8  # of the memory that the weights leave; a step needs some, too
PINNED_BYTES = 1 << 24  # a buffer from which a slice is copied to the GPU


@dataclass(frozen=True)
class Gpu(Device):
    """A Device that is a GPU.

    Attributes
    ----------
    cupy : module
    stream : cupy.cuda.Stream
        The rank's own, on which all happens: captures and NCCL take no other. From `open_gpu` on it is CuPy's
        current stream, too.
    gpus : int
        Of this host.
    """

    cupy: Any = None
    stream: Any = None
    gpus: int = 1
    is_gpu = True

    def weights_room(self):
        """As Device.weights_room: what is free of the GPU's memory."""
        device = self.cupy.cuda.Device()
        # By the bus: a launcher may show each rank its own GPU as number 0.
        return f"GPU {device.id} ({device.pci_bus_id}) of {platform.node()}", device.mem_info[0]

    def cache_room(self, ranks):
        """As Device.cache_room: most of what is free now."""
        free, _ = self.cupy.cuda.Device().mem_info
        return int(free * CACHE_SHARE / -(-ranks // self.gpus))

    def to_host(self, array):
        """Copy an array of this GPU to the host, after everything that the rank's stream was given before.

        `cupy.ndarray.get` of an array that is not contiguous enters and leaves a stream to copy it. So the
        contiguous copy is made here first, on the rank's stream.

        Raises
        ------
        RankError
            if another stream than the rank's has become current.
        """
        self.check_stream()
        return self.cupy.asnumpy(self.cupy.ascontiguousarray(array), stream=self.stream)

    def from_host(self, array):
        """Copy a NumPy array to this GPU, on the rank's stream; raises as `to_host`."""
        self.check_stream()
        return self.cupy.asarray(array)

    def check_stream(self):
        """Raise RankError unless the rank's stream is CuPy's current one.

        CuPy's arithmetic goes to the current stream, NCCL's calls, graphs and copies go to the rank's: on two
        streams they would run at the same time.
        """
        current = self.cupy.cuda.get_current_stream()
        if current.ptr != self.stream.ptr:
            raise RankError(
                f"CuPy's current stream ({current.ptr:#x}) is not this rank's ({self.stream.ptr:#x}): a GPU "
                "must be used in the thread that opened it, no other may be opened there later, and other "
                "streams chosen only in a `with` block"
            )


def open_gpu(local_rank=0, share=False):
    """The Gpu of the rank that is number `local_rank` on its host; its dtype is float32 until one is chosen.

    Parameters
    ----------
    local_rank : int
    share : bool
        Several ranks may be on one GPU.

    Raises
    ------
    RankError
        if there is no CuPy or no GPU.
    InputError
        if there are more ranks than GPUs.
    """
    cupy = find_cupy()
    gpus = cupy.cuda.runtime.getDeviceCount()
    if local_rank >= gpus and not share:
        there = "is 1" if gpus == 1 else f"are {gpus}"
        raise InputError(
            f"--device cuda: rank {local_rank} of this host has no GPU, there {there}; use --tp {gpus}, "
            "or --share-gpu (results are correct but slow), or --device cpu"
        )
    cupy.cuda.Device(local_rank % gpus).use()  # before anything is allocated
    stream = cupy.cuda.Stream(non_blocking=True)
    # Entered and never left. After `use()` the end of any `with` block of a stream would make the null stream
    # the current one, and CuPy has such blocks of its own.
    stream.__enter__()
    return Gpu(Arrays(cupy), np.dtype(np.float32), cupy, stream, gpus)


def with_dtype(gpu, dtype, checkpoint_dtype):
    """The same Gpu for --dtype; auto: the checkpoint's own if that has 16 bits, else bfloat16."""
    if dtype == "auto":
        dtype = checkpoint_dtype if checkpoint_dtype in ("float16", "bfloat16") else "bfloat16"
    return replace(gpu, dtype=np.dtype(DTYPES[dtype]))


def find_cupy():
    """The module `cupy`, with a GPU for it; else RankError."""
    try:
        import cupy

        gpus = cupy.cuda.runtime.getDeviceCount()
    except ImportError as error:
        raise RankError(f"--device cuda needs CuPy: {EXTRA}; {one_line(error)[:80]}") from error
    except RuntimeError as error:  # CuPy's CUDARuntimeError
        raise RankError(f"--device cuda: CUDA finds no GPU: {one_line(error)[:100]}") from error
    if gpus == 0:
        raise RankError("--device cuda: CUDA finds no GPU; nvidia-smi shows what the driver sees")
    return cupy


class Uploads:
    """Copies to the GPU through two pinned buffers in turn: one is filled while the other is copied.

    Pinned memory is what the copy engine reads by itself, so that reading a file and copying overlap.
    """

    def __init__(self, gpu):
        import cupyx

        self._gpu, self._turn = gpu, 0
        self._buffers = [cupyx.empty_pinned(PINNED_BYTES, np.uint8) for _ in range(2)]
        self._events = [gpu.cupy.cuda.Event(disable_timing=True) for _ in range(2)]

    def copy(self, rows, out):
        """`rows`, a NumPy array [n, m], to `out` [n, >= m] on the GPU, rounded to its dtype, padded with 0.

        The rows of `out` must be contiguous.
        """
        cuda, width = self._gpu.cupy.cuda, rows.shape[1]
        if width == 0:
            return
        step = max(1, PINNED_BYTES // out.strides[0])
        for start in range(0, len(rows), step):
            block = rows[start : start + step]  # [<= step, m]
            self._turn = 1 - self._turn
            self._events[self._turn].synchronize()  # the last copy from this buffer is through
            pinned = self._buffers[self._turn][: len(block) * out.strides[0]].view(out.dtype)
            pinned = pinned.reshape(len(block), -1)  # [<= step, >= m]
            pinned[:, :width] = block
            pinned[:, width:] = 0
            target, kind = out[start:].data.ptr, cuda.runtime.memcpyHostToDevice
            cuda.runtime.memcpyAsync(target, pinned.ctypes.data, pinned.nbytes, kind, self._gpu.stream.ptr)
            self._events[self._turn].record(self._gpu.stream)

    def finish(self):
        """Wait for the last copies."""
        self._gpu.stream.synchronize()
