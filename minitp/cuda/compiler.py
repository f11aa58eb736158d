"""From the .cu files in kernels/ to kernels that can be launched."""

from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np

SOURCES = Path(__file__).parent / "kernels"
HEADER = "common.h"


class Compiler:
    """Compiles kernels for one GPU and one 16-bit dtype, each once, through NVRTC.

    Parameters
    ----------
    cupy : module
    dtype : numpy.dtype
        float16 or bfloat16, of weights and activations.
    """

    def __init__(self, cupy, dtype):
        self._cupy, self.dtype = cupy, dtype
        self._module = cache(self._compile)  # of this object

    def kernel(self, file, name, **defines):
        """A kernel to be called as kernel(grid, block, args, shared_mem=0): `name` in `file`, with macros."""
        return Kernel(self._module(file, tuple(sorted(defines.items()))).get_function(name))

    def _compile(self, file, defines):
        options = compile_options(self.dtype, **dict(defines))
        return self._cupy.RawModule(code=whole_source(file), options=options, backend="nvrtc")


class Kernel:
    """A kernel as CuPy has it, but None stands for a null pointer: CuPy would pass no argument at all."""

    def __init__(self, function):
        self._function = function

    def __call__(self, grid, block, args, shared_mem=0):
        given = tuple(np.uint64(0) if arg is None else arg for arg in args)
        self._function(grid, block, given, shared_mem=shared_mem)

    def allow_shared_memory(self, nbytes):
        """Let launches ask for so much dynamic shared memory, where the usual limit is 48 KiB."""
        self._function.max_dynamic_shared_size_bytes = nbytes


def whole_source(file):
    """A file with its header in it: CuPy would take a kernel from its cache though an include has changed."""
    text, header = ((SOURCES / name).read_text(encoding="utf-8") for name in (file, HEADER))
    return text.replace(f'#include "{HEADER}"', header)


def compile_options(dtype, **defines):
    """What a compiler is told, whichever it is."""
    macros = [f"-D{name}={value}" for name, value in defines.items()]
    return ("-std=c++17", *macros, *(["-DBFLOAT16"] if dtype == ml_dtypes.bfloat16 else []))
