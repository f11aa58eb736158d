"""Where a rank computes: the array module and the compute dtype."""

import platform
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from minitp.util.environment import memory

CACHE_SHARE = 0.25  # of a host's memory
LINE_BYTES = 64  # of a CPU's cache, and more than a load of a GPU takes
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Device:
    """A rank's place of work.

    Attributes
    ----------
    xp : module
        `numpy`, or on a GPU `cuda.arrays.Arrays`; what `ops` computes with.
    dtype : numpy.dtype
        Weights and the residual stream.
    """

    xp: Any
    dtype: np.dtype
    is_gpu = False

    def to_host(self, array):
        """A NumPy array of the same numbers; on the CPU it is the array itself."""
        return array

    def weights_room(self):
        """(where, bytes): the memory for weights, which all ranks of the same `where` share."""
        return f"the memory of {platform.node()}", memory()

    def cache_room(self, ranks):
        """Bytes that the keys and values of all sequences may take on one of so many ranks of a host."""
        return int(memory() * CACHE_SHARE / ranks)

    def memory(self, nbytes):
        """uint8 [nbytes] that begins with a cache line: products read it faster than across lines."""
        room = self.xp.empty(nbytes + LINE_BYTES, dtype=np.uint8)
        start = -room.ctypes.data % LINE_BYTES
        return room[start : start + nbytes]


def open_device(dtype="auto"):
    """The CPU, computing in `dtype`: float32 ("auto"), float16 or bfloat16.

    NumPy has no 16-bit products: it turns the weights into float32 for each one. That is slow; it is here
    to see what a 16-bit run does to the numbers.
    """
    return Device(np, np.dtype(DTYPES["float32" if dtype == "auto" else dtype]))
