"""The device that a rank computes on: its array module and its compute dtype."""

import platform
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import ml_dtypes
import numpy as np

from minitp.util.environment import cpu_name, memory

CACHE_SHARE = 0.25  # share of a host's memory that all its KV caches together may use
READ_SHAPE, READ_S = (4096, 8192), 0.3  # matrix and time of `read_rate`; 128 MB do not fit in a cache
LINE_BYTES = 64  # a CPU's cache line; more than enough alignment for a GPU's widest load
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Device:
    """The device of a rank.

    Attributes
    ----------
    xp : module
        The array module that `ops` computes with: `numpy`, or `cuda.arrays.Arrays` on a GPU.
    dtype : numpy.dtype
        The dtype of the weights and the residual stream.
    """

    xp: Any
    dtype: np.dtype
    is_gpu = False

    @property
    def name(self):
        """The name of the hardware: of the CPU, or of this rank's GPU."""
        return cpu_name()

    def to_host(self, array):
        """Return the array as a NumPy array; on the CPU that is the array itself."""
        return array

    def weights_room(self):
        """Return (name, bytes) of the memory for weights; ranks that return the same name share it."""
        return f"the memory of {platform.node()}", memory()

    def cache_room(self, ranks):
        """Return the bytes that the KV caches of one rank may use if `ranks` ranks share the host."""
        return int(memory() * CACHE_SHARE / ranks)

    def read_rate(self):
        """Return the bytes per second that this rank reads in products of one row, as a decode pass does."""
        row = self.xp.ones((1, READ_SHAPE[0]), np.float32)  # [1, in]
        w = self.memory(4 * READ_SHAPE[0] * READ_SHAPE[1]).view(np.float32).reshape(READ_SHAPE)  # [in, out]
        w.fill(0.01)
        return w.nbytes * calls_per_second(lambda: row @ w)

    def memory(self, nbytes):
        """Allocate uint8 [nbytes], aligned to a cache line, which makes matrix products faster."""
        padded = self.xp.empty(nbytes + LINE_BYTES, dtype=np.uint8)  # [nbytes + LINE_BYTES]
        start = -padded.ctypes.data % LINE_BYTES
        return padded[start : start + nbytes]  # [nbytes]


def calls_per_second(function, seconds=READ_S):
    """Call a function for some time; return the calls per second."""
    calls, started = 0, perf_counter()
    while (elapsed := perf_counter() - started) < seconds:
        function()
        calls += 1
    return calls / elapsed


def open_device(dtype="auto"):
    """Return the CPU as a Device that computes in `dtype`: float32 ("auto"), float16 or bfloat16.

    NumPy has no 16-bit matrix product, so 16-bit weights are converted to float32 for every product. This is
    slow, but it shows how a 16-bit run changes the numbers.
    """
    return Device(np, np.dtype(DTYPES["float32" if dtype == "auto" else dtype]))
