"""Compile the .cu files in kernels/ into kernels that can be launched."""

import re
from functools import cache, cached_property
from pathlib import Path

import ml_dtypes
import numpy as np

from minitp.cuda.launch import extended_launch

SOURCES = Path(__file__).parent / "kernels"
INCLUDE = re.compile(r'#include "([\w.]+)"')


class Compiler:
    """A kernel compiler (NVRTC with a cache) for one GPU and one 16-bit dtype.

    Parameters
    ----------
    cupy : module
    dtype : numpy.dtype
        The dtype of weights and activations: float16 or bfloat16.
    """

    def __init__(self, cupy, dtype):
        self._cupy, self.dtype = cupy, dtype
        self._module = cache(self._compile)  # one cache per compiler

    @property
    def has_clusters(self):
        """True if kernels can be launched in clusters of blocks."""
        return self._extended_launch is not None

    def kernel(self, file, name, **defines):
        """Return the kernel `name` of `file`, compiled with `defines` as macros."""
        function = self._module(file, tuple(sorted(defines.items()))).get_function(name)
        return Kernel(function, self._extended_launch)

    @cached_property
    def _extended_launch(self):
        return extended_launch(self._cupy)

    def _compile(self, file, defines):
        options = compile_options(self.dtype, **dict(defines))
        return self._cupy.RawModule(code=whole_source(file), options=options, backend="nvrtc")


class Kernel:
    """A CuPy kernel that accepts None as a null pointer; CuPy itself would leave out the argument.

    Parameters
    ----------
    function : cupy.RawKernel
    extended_launch : ExtendedLaunch or None
        None if the GPU supports neither dependent launches nor clusters.
    """

    def __init__(self, function, extended_launch=None):
        self._function, self._extended_launch = function, extended_launch

    def __call__(self, grid, block, args, shared_mem=0, dependent=False, cluster=1):
        """Launch the kernel on CuPy's current stream.

        Parameters
        ----------
        grid, block : tuple of int
        args : tuple
            GPU arrays, NumPy scalars, and None for null pointers.
        shared_mem : int
            Bytes of dynamic shared memory per block.
        dependent : bool
            Let the kernel start before the previous one ends, where the GPU can: the kernel must call
            `wait_for_previous`.
        cluster : int
            Number of blocks per cluster, along x; above 1 only if the compiler `has_clusters`.
        """
        args = tuple(np.uint64(0) if arg is None else arg for arg in args)
        if self._extended_launch is not None and (dependent or cluster > 1):
            self._extended_launch(self._function, grid, block, args, shared_mem, dependent, cluster)
        elif cluster > 1:
            raise ValueError(f"clusters of {cluster} blocks on a GPU without clusters")
        else:
            self._function(grid, block, args, shared_mem=shared_mem)

    def allow_shared_memory(self, nbytes):
        """Let launches use `nbytes` of dynamic shared memory; the default limit is 48 KiB."""
        self._function.max_dynamic_shared_size_bytes = nbytes


def whole_source(file):
    """Return a file's text with included files pasted in, because CuPy's cache ignores changed includes."""
    text = (SOURCES / file).read_text(encoding="utf-8")
    return INCLUDE.sub(lambda include: whole_source(include[1]), text)


def compile_options(dtype, **defines):
    """Return the options for NVRTC; nvcc accepts them too."""
    macros = [f"-D{name}={value}" for name, value in defines.items()]
    return ("-std=c++17", *macros, *(["-DBFLOAT16"] if dtype == ml_dtypes.bfloat16 else []))
