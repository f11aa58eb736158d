"""Launch kernels with attributes that CuPy cannot set: dependent launches and clusters of blocks.

A *dependent* kernel may start while the kernel before it on the stream still runs. It waits for that kernel
itself, by `wait_for_previous` in common.h, and can request its weights before. A *cluster* is a group of
neighboring blocks that run at the same time and can read each other's shared memory. Both need a GPU of
compute capability 9.0 (Hopper), and `cuLaunchKernelEx` of the CUDA driver, which is called through ctypes.
Captured launches keep their attributes.
"""

import ctypes
from functools import cache

import numpy as np

from minitp.errors import RankError

HOPPER = 90  # the compute capability that has these attributes, as CuPy writes it
CLUSTER_DIMENSION, PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6  # members of CUlaunchAttributeID in cuda.h


class LaunchAttribute(ctypes.Structure):
    """A CUlaunchAttribute of cuda.h; its value is a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_uint), ("padding", ctypes.c_uint), ("value", ctypes.c_uint * 16))


class LaunchConfig(ctypes.Structure):
    """A CUlaunchConfig of cuda.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_mem", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    )


class ExtendedLaunch:
    """A function that launches a CuPy kernel with attributes, on CuPy's current stream.

    Parameters
    ----------
    cupy : module
    launch : callable
        The driver's cuLaunchKernelEx.
    """

    def __init__(self, cupy, launch):
        self._cupy, self._launch = cupy, launch

    def __call__(self, kernel, grid, block, args, shared_mem, dependent, cluster):
        """Launch `kernel`, a cupy.RawKernel; its arguments are GPU arrays and NumPy scalars.

        Parameters
        ----------
        grid, block : tuple of int
        args : tuple
        shared_mem : int
            Bytes of dynamic shared memory per block.
        dependent : bool
        cluster : int
            Number of blocks per cluster, along x.

        Raises
        ------
        RankError
            if the driver refuses the launch.
        """
        attributes = _attributes(dependent, cluster)
        stream = self._cupy.cuda.get_current_stream().ptr
        config = LaunchConfig(_three(grid), _three(block), shared_mem, stream, attributes, len(attributes))
        values = [_value(arg) for arg in args]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        code = self._launch(ctypes.byref(config), ctypes.c_void_p(kernel.kernel.ptr), pointers, None)
        if code:
            raise RankError(
                f"the CUDA driver refuses a launch of {kernel.name} with CUresult {code}: grid {grid}, "
                f"block {block}, shared_mem={shared_mem}, cluster={cluster}"
            )


def extended_launch(cupy):
    """Return an ExtendedLaunch for the current GPU, or None if the GPU or its driver is too old."""
    launch = driver_launch() if int(cupy.cuda.Device().compute_capability) >= HOPPER else None
    return None if launch is None else ExtendedLaunch(cupy, launch)


def driver_launch():
    """Return cuLaunchKernelEx of the installed CUDA driver, or None if it has no such function."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    except (OSError, AttributeError):
        return None


@cache
def _attributes(dependent, cluster):
    """Return an array of the attributes of a launch, which launches share: the driver only reads it."""
    found = []
    if dependent:
        found.append(LaunchAttribute(PROGRAMMATIC_STREAM_SERIALIZATION, 0, (1,)))
    if cluster > 1:
        found.append(LaunchAttribute(CLUSTER_DIMENSION, 0, (cluster, 1, 1)))
    return (LaunchAttribute * len(found))(*found)


_c_type = cache(np.ctypeslib.as_ctypes_type)


def _value(arg):
    """Return an argument as the C value that the driver copies."""
    if isinstance(arg, np.generic):
        return _c_type(type(arg))(arg.item())
    return ctypes.c_void_p(arg.data.ptr)


def _three(size):
    return (*size, 1, 1)[:3]
