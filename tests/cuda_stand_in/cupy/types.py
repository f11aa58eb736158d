"""The loop that CuPy runs for an operation and dtypes, according to CuPy's own tables in `types.json`.

CuPy tries an operation's loops in order and uses the first one that the inputs can be cast to without loss.
So if there is no loop for bfloat16, it silently widens to float32. Python numbers take the dtype of the
arrays they are combined with.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

TABLES = json.loads(Path(__file__).with_name("types.json").read_text())["types"]
OTHER_NAMES = {"divide": "true_divide", "abs": "absolute"}  # NumPy's -> CuPy's
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def loop_of(name, inputs):
    """Return the input dtypes and the result dtype of an operation on these arrays and Python numbers."""
    name = OTHER_NAMES.get(name, name)
    kinds = weakly_typed(inputs)
    for loop in TABLES[name]:
        loop_inputs, result = loop.split("->")
        loop_kinds = [dtype_of(char) for char in loop_inputs]
        if all(np.can_cast(kind, loop_kind) for kind, loop_kind in zip(kinds, loop_kinds, strict=True)):
            return loop_kinds, dtype_of(result)
    raise TypeError(f"cupy.{name} has no loop for {', '.join(map(str, kinds))}")


def weakly_typed(inputs):
    """Return the dtype of each input; a Python number takes the arrays' dtype if that can represent it."""
    arrays = [x.dtype for x in inputs if hasattr(x, "dtype")]
    common = np.result_type(*[kind for kind in arrays if kind != np.bool_] or arrays) if arrays else None
    return [x.dtype if hasattr(x, "dtype") else number_dtype(x, common) for x in inputs]


def number_dtype(number, common):
    """Return the dtype that a Python number takes among arrays of dtype `common`; None if there are none."""
    if isinstance(number, bool):
        return np.dtype(bool)
    if common is None or common == np.bool_:
        return np.dtype(type(number))
    is_float = common == BFLOAT16 or common.kind == "f"
    return common if is_float or isinstance(number, int) else np.dtype(np.float64)


def dtype_of(char):
    return BFLOAT16 if char == "E" else np.dtype(char)
