"""What tests on a real GPU share.

A GPU has what the tests on the CPU cannot find: races, memory ordering, tensor cores. So what runs there runs
several times, and has to give the same bits each time.
"""

import importlib.util

import numpy as np
import pytest

from minitp.errors import MinitpError

REPEATS = 20
HALVES = ["float16", "bfloat16"]


def why_not():
    """Why these tests cannot run here, or None."""
    if importlib.util.find_spec("cupy") is None:
        return "no CuPy here"
    from minitp.cuda.gpu import find_cupy

    try:
        find_cupy()
    except MinitpError as error:
        return str(error)
    return None


REASON = why_not()
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=REASON or "")]


def drawn(gpu, dtype, *shape, seed=0, scale=1.0):
    """Random numbers on the GPU, uniform and of variance scale**2."""
    values = np.random.default_rng(seed).random(shape, np.float32) - np.float32(0.5)
    return gpu.from_host((values * np.float32(12**0.5 * scale)).astype(dtype))


def same_each_time(gpu, run):
    """What `run` returns, a NumPy array; REPEATS times the same bits."""
    first = gpu.to_host(run())
    for _ in range(REPEATS):
        np.testing.assert_array_equal(gpu.to_host(run()).view(np.uint8), first.view(np.uint8))
    return first
