"""The CUDA driver's function for launches with attributes."""

import weakref
from dataclasses import dataclass
from typing import Any

functions = weakref.WeakValueDictionary()  # address of a kernel -> the kernel
CLUSTER_DIMENSION, PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6


@dataclass
class Launch:
    """A launch of a kernel, which runs when it is called.

    If it is dependent, `previous` runs while it waits.
    """

    kernel: Any
    grid: tuple
    block: tuple
    values: list
    shared_mem: int
    dependent: bool
    cluster: int

    def __call__(self, previous=None):
        options = self.shared_mem, self.dependent, self.cluster, previous
        self.kernel.launch(self.grid, self.block, self.values, *options)


def cuLaunchKernelEx(config, function, pointers, extra):
    """Launch the kernel at an address; the arguments are ctypes objects, and the result is a CUresult."""
    config = config._obj
    attributes = {one.id: one.value for one in config.attributes[: config.attribute_count]}
    if extra is not None or attributes.keys() - {CLUSTER_DIMENSION, PROGRAMMATIC_STREAM_SERIALIZATION}:
        return 1  # CUDA_ERROR_INVALID_VALUE
    cluster = attributes.get(CLUSTER_DIMENSION, [1, 1, 1])
    dependent = bool(attributes.get(PROGRAMMATIC_STREAM_SERIALIZATION, [0])[0])
    sizes = tuple(config.grid), tuple(config.block)
    kernel = functions[function.value]
    kernel.launch_values(*sizes, list(pointers), config.shared_mem, dependent, cluster[0])
    return 0
