"""A pytest plugin with which the tests that run kernels on the CPU run them on a GPU instead.

    PYTHONPATH=tests python -m pytest -p kernels_on_gpu tests/rooms/cuda/test_linear.py ...

The tests use NumPy arrays. A kernel's arrays are copied to the GPU before its launch, and back afterwards.
"""

from functools import cache

import cuda_on_cpu
import numpy as np

from minitp.cuda.compiler import Compiler
from minitp.cuda.gpu import open_gpu

the_gpu = cache(open_gpu)  # one GPU for all tests, because each call of open_gpu creates another stream


class GpuCompiler:
    """A replacement for cuda_on_cpu.CpuCompiler."""

    def __init__(self, dtype, has_clusters=False):
        self._gpu = the_gpu()
        self._compiler = Compiler(self._gpu.cupy, np.dtype(dtype))
        self.has_clusters = has_clusters and self._compiler.has_clusters

    def kernel(self, file, name, **defines):
        return HostArrays(self._gpu, self._compiler.kernel(file, name, **defines))

    def lend(self, array):
        """Copy an array to the GPU; return the address and a function that returns its content later."""
        copy = self._gpu.from_host(as_bytes(array).copy())
        return copy.data.ptr, lambda: self._gpu.to_host(copy).view(array.dtype)


class HostArrays:
    """A GPU kernel that can be called with NumPy arrays."""

    def __init__(self, gpu, kernel):
        self._gpu, self._kernel = gpu, kernel
        self.allow_shared_memory = kernel.allow_shared_memory

    def __call__(self, grid, block, args, shared_mem=0, dependent=False, cluster=1):
        owners = {}  # id of an array with its own memory -> (array, its copy on the GPU)
        gpu_args = []
        for arg in args:
            if not isinstance(arg, np.ndarray):
                gpu_args.append(arg)
                continue
            owner = owner_of(arg)
            if id(owner) not in owners:
                owners[id(owner)] = owner, self._gpu.from_host(as_bytes(owner).copy())
            start = address(arg) - address(owner)
            gpu_args.append(np.uint64(owners[id(owner)][1].data.ptr + start))
        self._kernel(grid, block, tuple(gpu_args), shared_mem, dependent, cluster)
        self._gpu.stream.synchronize()
        for owner, copy in owners.values():
            if owner.flags.writeable:
                as_bytes(owner)[...] = self._gpu.to_host(copy)


def owner_of(array):
    """Return the array that owns the memory of a view."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def as_bytes(owner):
    """Return the memory of an array without gaps as a view, uint8 [n], in memory order."""
    flat = owner.ravel(order="K")  # a view
    return flat.view(np.uint8)


def address(array):
    return array.__array_interface__["data"][0]


cuda_on_cpu.CpuCompiler = GpuCompiler
