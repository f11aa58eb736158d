"""Write the input and result dtypes of CuPy's elementwise operations and reductions, for the stand-in.

    python tests/support/make_cupy_types.py tests/cuda_stand_in/cupy/types.json

This needs CuPy, but no GPU. A loop is written as in NumPy: `?ee->e` has a bool and two float16 inputs and a
float16 result; `E` is bfloat16.
"""

import gc
import importlib
import json
import sys
from pathlib import Path

import cupy

UFUNCS = (
    "absolute", "add", "bitwise_and", "bitwise_or", "bitwise_xor", "cos", "equal", "exp", "floor_divide",
    "greater", "greater_equal", "invert", "isfinite", "isnan", "less", "less_equal", "log", "logical_and",
    "logical_not", "logical_or", "maximum", "minimum", "multiply", "negative", "not_equal", "power",
    "remainder", "rint", "sin", "sqrt", "square", "subtract", "tanh", "true_divide",
)  # fmt: skip
REDUCTIONS = {"sum": "cupy_sum", "max": "cupy_max", "min": "cupy_min", "argmax": "cupy_argmax"}


def tables():
    """Return each operation's loops, in the order in which CuPy tries them."""
    found = {name: list(getattr(cupy, name).types) for name in UFUNCS}
    # `copyto`, `astype`, indexing and concatenation all use this one.
    found["copy"] = list(cupy._core.elementwise_copy.types)
    found["where"] = list(importlib.import_module("cupy._sorting.search")._where_ufunc.types)
    kernels = {x.name: x for x in gc.get_objects() if type(x).__name__ == "_SimpleReductionKernel"}
    for name, kernel in REDUCTIONS.items():
        found[name] = [written(loop) for loop in kernels[kernel]._ops.ops]
    return found


def written(loop):
    """Format a reduction's loop as text."""
    inputs, result = ("".join(kind.char for kind in kinds) for kinds in (loop.in_types, loop.out_types))
    return f"{inputs}->{result}"


if __name__ == "__main__":
    text = json.dumps({"cupy": cupy.__version__, "types": tables()}, indent=1)
    Path(sys.argv[1]).write_text(text + "\n")
