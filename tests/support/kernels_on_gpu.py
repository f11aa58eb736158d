"""A pytest plugin: the tests of kernels, which run them on the CPU, run them on a GPU instead.

    PYTHONPATH=tests python -m pytest -p kernels_on_gpu tests/rooms/cuda/test_linear.py ...

Their arrays are NumPy's: what a kernel is given is copied to the GPU before its launch, and back afterwards.
"""

from functools import cache

import cuda_on_cpu
import numpy as np

from minitp.cuda.compiler import Compiler
from minitp.cuda.gpu import open_gpu

the_gpu = cache(open_gpu)  # one for all tests: each call would choose another stream


class GpuCompiler:
    """In place of cuda_on_cpu.CpuCompiler."""

    def __init__(self, dtype):
        self._gpu = the_gpu()
        self._compiler = Compiler(self._gpu.cupy, np.dtype(dtype))

    def kernel(self, file, name, **defines):
        return HostArrays(self._gpu, self._compiler.kernel(file, name, **defines))


class HostArrays:
    """A kernel to be called with NumPy arrays."""

    def __init__(self, gpu, kernel):
        self._gpu, self._kernel = gpu, kernel
        self.allow_shared_memory = kernel.allow_shared_memory

    def __call__(self, grid, block, args, shared_mem=0):
        owners, given = {}, []  # id of an array that has memory of its own -> (it, its copy on the GPU)
        for arg in args:
            if not isinstance(arg, np.ndarray):
                given.append(arg)
                continue
            owner = owner_of(arg)
            if id(owner) not in owners:
                owners[id(owner)] = owner, self._gpu.from_host(as_bytes(owner).copy())
            start = address(arg) - address(owner)
            given.append(np.uint64(owners[id(owner)][1].data.ptr + start))
        self._kernel(grid, block, tuple(given), shared_mem=shared_mem)
        self._gpu.stream.synchronize()
        for owner, copy in owners.values():
            if owner.flags.writeable:
                as_bytes(owner)[...] = self._gpu.to_host(copy)


def owner_of(array):
    """The array in whose memory this one lies."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def as_bytes(owner):
    """uint8 [n]: the memory of an array that has no gaps, in the order in which it lies."""
    flat = owner.ravel(order="K")  # a view
    return flat.view(np.uint8)


def address(array):
    return array.__array_interface__["data"][0]


cuda_on_cpu.CpuCompiler = GpuCompiler
