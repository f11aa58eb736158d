"""A rank's GPU: its stream, its memory, and copies to and from the host."""

import platform
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minitp.cuda.arrays import Arrays
from minitp.device import DTYPES, Device
from minitp.errors import InputError, RankError, one_line
from minitp.util.environment import CUPY_EXTRA
from minitp.util.format import counted

CACHE_SHARE = 0.8  # the KV cache's share of the memory left by the weights; activations need the rest


@dataclass(frozen=True)
class Gpu(Device):
    """A Device that is a GPU.

    Attributes
    ----------
    cupy : module
    stream : cupy.cuda.Stream
        The rank's own stream. All its work goes there, because captures and NCCL use no other stream.
        `open_gpu` also makes it CuPy's current stream.
    gpus : int
        Number of GPUs on this host.
    """

    cupy: Any = None
    stream: Any = None
    gpus: int = 1
    is_gpu = True

    @property
    def name(self):
        """The name of this rank's GPU."""
        runtime = self.cupy.cuda.runtime
        return runtime.getDeviceProperties(self.cupy.cuda.Device().id)["name"].decode()

    def weights_room(self):
        """Return (GPU and host, free bytes of this GPU), like Device.weights_room."""
        device = self.cupy.cuda.Device()
        # The bus id identifies a GPU; a launcher may show each rank its own GPU as number 0.
        return f"GPU {device.id} ({device.pci_bus_id}) of {platform.node()}", device.mem_info[0]

    def read_rate(self):
        """Return the bytes per second that this GPU reads in a kernel that only reads."""
        from minitp.cuda.read_rate import read_rate

        return read_rate(self)

    def cache_room(self, ranks):
        """Return the bytes that the KV cache may use: most of the memory that is free now."""
        free, _ = self.cupy.cuda.Device().mem_info
        return int(free * CACHE_SHARE / -(-ranks // self.gpus))

    def to_host(self, array):
        """Copy an array from this GPU to the host, after all work already on the rank's stream.

        For an array that is not contiguous, `cupy.ndarray.get` enters and leaves a stream. So the array is
        made contiguous first, on the rank's stream.

        Raises
        ------
        RankError
            if CuPy's current stream is not the rank's.
        """
        self.check_stream()
        return self.cupy.asnumpy(self.cupy.ascontiguousarray(array), stream=self.stream)

    def from_host(self, array):
        """Copy a NumPy array to this GPU, on the rank's stream; raises RankError like `to_host`."""
        self.check_stream()
        return self.cupy.asarray(array)

    def check_stream(self):
        """Raise RankError unless the rank's stream is CuPy's current stream.

        CuPy's arithmetic uses the current stream, while NCCL, graphs and copies use the rank's. On two
        different streams they would run at the same time.
        """
        current = self.cupy.cuda.get_current_stream()
        if current.ptr != self.stream.ptr:
            raise RankError(
                f"CuPy's current stream ({current.ptr:#x}) is not this rank's ({self.stream.ptr:#x}): use a "
                "GPU only in the thread that opened it, open no second GPU in that thread, and select other "
                "streams only in a `with` block"
            )


def open_gpu(local_rank=0, share=False):
    """Open the GPU for rank `local_rank` of this host; its dtype is float32 until `with_dtype` sets it.

    Parameters
    ----------
    local_rank : int
    share : bool
        Let several ranks use one GPU.

    Raises
    ------
    RankError
        if there is no GPU.
    InputError
        if there is no CuPy, or there are more ranks than GPUs.
    """
    cupy = find_cupy()
    gpus = cupy.cuda.runtime.getDeviceCount()
    if local_rank >= gpus and not share:
        there = "is only 1" if gpus == 1 else f"are only {gpus}"
        ranks = counted(gpus, "rank")
        raise InputError(
            f"--device cuda: rank {local_rank} of this host has no GPU: there {there}; use at "
            f"most {ranks} on this host, or --share-gpu (results are correct but slow), or --device cpu"
        )
    cupy.cuda.Device(local_rank % gpus).use()  # before anything is allocated
    stream = cupy.cuda.Stream(non_blocking=True)
    # Enter the stream and never leave it. After `use()`, the end of any stream's `with` block would make the
    # null stream current, and CuPy itself contains such blocks.
    stream.__enter__()
    return Gpu(Arrays(cupy), np.dtype(np.float32), cupy, stream, gpus)


def with_dtype(gpu, dtype, checkpoint_dtype):
    """Return the Gpu with the dtype of --dtype; auto means the checkpoint's if 16-bit, else bfloat16."""
    if dtype == "auto":
        dtype = checkpoint_dtype if checkpoint_dtype in ("float16", "bfloat16") else "bfloat16"
    return replace(gpu, dtype=np.dtype(DTYPES[dtype]))


def find_cupy():
    """Import `cupy` and return it; raise InputError if it is missing, RankError if it finds no GPU."""
    try:
        import cupy

        gpus = cupy.cuda.runtime.getDeviceCount()
    except ImportError as error:
        raise InputError(f"--device cuda needs CuPy: {CUPY_EXTRA}; {one_line(error)[:80]}") from error
    except RuntimeError as error:  # CuPy's CUDARuntimeError
        raise RankError(f"--device cuda: CUDA finds no GPU: {one_line(error)[:100]}") from error
    if gpus == 0:
        raise RankError("--device cuda: CUDA finds no GPU; nvidia-smi shows what the driver sees")
    return cupy
