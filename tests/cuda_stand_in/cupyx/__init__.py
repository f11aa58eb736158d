import numpy as np


def empty_pinned(shape, dtype=float):
    return np.full(shape, 0xFF, np.uint8) if np.dtype(dtype) == np.uint8 else np.empty(shape, dtype)
