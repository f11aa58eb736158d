"""The steps that an engine rounds to a smaller dtype than its own, as a recording's metadata names them."""

import json

import numpy as np

from minitp.errors import InputError, shown

DTYPES = ("float16", "bfloat16")


def read_roundings(text, path):
    """Return the dtype of each step that the engine rounds, or rounds the inputs of: step -> numpy dtype.

    The dtype is None if the engine rounds to 8 bits, for which there are no bounds.

    Parameters
    ----------
    text : str
        The JSON object `roundings` in the metadata.
    path : Path
        The recording, for the error message.
    """
    try:
        found = json.loads(text)
        if set(found.values()) <= {*DTYPES, None}:
            return {step: dtype and np.dtype(dtype) for step, dtype in found.items()}
    except (ValueError, AttributeError, TypeError):
        pass
    raise InputError(f"{path}: roundings {shown(text)}: expected an object of {' and '.join(DTYPES)} by step")


def cache_dtype(cached, dtype):
    """Return the dtype of a cache for the replay: "auto" if it is that of the engine.

    Parameters
    ----------
    cached : str
        The dtype of the recorded cache.
    dtype : numpy dtype
        The engine's dtype.
    """
    if cached not in (*DTYPES, "float32", "float64"):
        return "auto"  # its arrays are refused as they are read
    return cached if np.dtype(cached).itemsize < dtype.itemsize else "auto"
