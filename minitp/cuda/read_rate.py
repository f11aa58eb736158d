"""The rate at which a GPU reads its memory, measured in a few milliseconds."""

import numpy as np

from minitp.cuda.compiler import Compiler
from minitp.cuda.kernels.read_memory import PIECE, ReadMemory

CACHES = 16  # size of the array in multiples of the L2 cache, so that reads rarely hit the cache
READS = 20  # number of reads that are timed together; one takes longer than its launch


def read_rate(gpu):
    """Return the bytes per second of a kernel that only reads; its arrays are freed afterwards."""
    cupy = gpu.cupy
    device = cupy.cuda.Device()
    nbytes = min(CACHES * device.attributes["L2CacheSize"], device.mem_info[0] // 4) // PIECE * PIECE
    data = cupy.arange(nbytes // 4, dtype=np.uint32)  # [n]: zeros might be read faster
    read = ReadMemory(Compiler(cupy, np.dtype(np.float16)), cupy, nbytes)  # the kernel has no 16-bit numbers
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    read(data)  # compiles the kernel
    start.record(gpu.stream)
    for _ in range(READS):
        read(data)
    end.record(gpu.stream)
    end.synchronize()
    seconds = cupy.cuda.get_elapsed_time(start, end) / 1000
    del data, read
    cupy.get_default_memory_pool().free_all_blocks()
    return READS * nbytes / seconds
