"""From the .cu files in this folder to kernels that can be launched."""

from functools import cache
from pathlib import Path

import ml_dtypes

HERE = Path(__file__).parent


class Compiler:
    """Compiles kernels for one GPU and one 16-bit dtype, each once, through NVRTC.

    Parameters
    ----------
    cupy : module
    dtype : numpy.dtype
        float16 or bfloat16, of weights and activations.
    """

    def __init__(self, cupy, dtype):
        self._cupy, self._dtype = cupy, dtype
        self._module = cache(self._compile)  # of this object

    def kernel(self, file, name, **defines):
        """A kernel to be called as kernel(grid, block, args, shared_mem=0): `name` in `file`, with macros."""
        return self._module(file, tuple(sorted(defines.items()))).get_function(name)

    def _compile(self, file, defines):
        text = (HERE / file).read_text(encoding="utf-8")
        options = compile_options(self._dtype, **dict(defines))
        return self._cupy.RawModule(code=text, options=(*options, f"-I{HERE}"), backend="nvrtc")


def compile_options(dtype, **defines):
    """What a compiler is told, whichever it is."""
    macros = [f"-D{name}={value}" for name, value in defines.items()]
    return ("-std=c++17", *macros, *(["-DBFLOAT16"] if dtype == ml_dtypes.bfloat16 else []))
