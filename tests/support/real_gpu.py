"""Helpers of the tests that need a real GPU.

Tests on the CPU cannot find races, missing memory ordering and errors of tensor cores. So on a GPU everything
runs several times and must give the same bits each time.
"""

import importlib.util

import numpy as np
import pytest

from minitp.errors import MinitpError

REPEATS = 20
HALVES = ["float16", "bfloat16"]


def why_not():
    """Return why these tests cannot run on this machine, or None."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed"
    from minitp.cuda.gpu import find_cupy

    try:
        find_cupy()
    except MinitpError as error:
        return str(error)
    return None


REASON = why_not()
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=REASON or "")]


def drawn(gpu, dtype, *shape, seed=0, scale=1.0):
    """Return uniform random numbers of variance scale**2 on the GPU."""
    values = np.random.default_rng(seed).random(shape, np.float32) - np.float32(0.5)
    return gpu.from_host((values * np.float32(12**0.5 * scale)).astype(dtype))


def same_each_time(gpu, run):
    """Return run()'s array as a NumPy array, and check that REPEATS more runs give the same bits."""
    first = gpu.to_host(run())
    for _ in range(REPEATS):
        np.testing.assert_array_equal(gpu.to_host(run()).view(np.uint8), first.view(np.uint8))
    return first
