"""Which loop of an operation CuPy runs for which dtypes, by CuPy's own tables: `types.json`.

CuPy tries an operation's loops in their order and takes the first to whose inputs those at hand can be cast
without loss. So where there is none for bfloat16 it widens to float32, and says nothing. Python's numbers
take the dtype of the arrays that they meet.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

TABLES = json.loads(Path(__file__).with_name("types.json").read_text())["types"]
OTHER_NAMES = {"divide": "true_divide", "abs": "absolute"}  # NumPy's -> CuPy's
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def loop_of(name, inputs):
    """The dtypes that an operation on these arrays and Python numbers takes, and the one that it gives."""
    name = OTHER_NAMES.get(name, name)
    kinds = weakly_typed(inputs)
    for loop in TABLES[name]:
        taken, made = loop.split("->")
        taken = [dtype_of(char) for char in taken]
        if all(np.can_cast(kind, one) for kind, one in zip(kinds, taken, strict=True)):
            return taken, dtype_of(made)
    raise TypeError(f"cupy.{name} has no loop for {', '.join(map(str, kinds))}")


def weakly_typed(inputs):
    """The dtype of each input; a Python number's is that of the arrays, if one of them is of its kind."""
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
