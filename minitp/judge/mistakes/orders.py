"""Parts of an array in another order: heads, or the slots of a cache."""

import numpy as np

MOST = 4  # parts out of place that are listed one by one
LARGEST = 4096  # parts that are compared with one another


def in_another_order(found, right, axis, noun):
    """Yield (description, array) if the parts of an array along an axis are out of order.

    Each wrong part is taken to be the part of the right array that is closest to it. If many are out of
    place, none may occur twice.

    Parameters
    ----------
    found, right : float64 array
        The recorded and the right array.
    axis : int
    noun : str
        The name of a part.
    """
    if found.shape != right.shape or not 1 < found.shape[axis] <= LARGEST:
        return
    parts, choices = (np.moveaxis(each, axis, 0).reshape(each.shape[axis], -1) for each in (found, right))
    source = np.arange(len(parts))  # [n]
    sizes = np.linalg.norm(choices, axis=1)  # [n]
    for i in np.flatnonzero(np.linalg.norm(parts - choices, axis=1) > 1e-2 * sizes):
        source[i] = np.argmin(np.linalg.norm(choices - parts[i], axis=1))
    moved = np.flatnonzero(source != np.arange(len(source)))
    if not len(moved) or (len(moved) > MOST and len(set(source.tolist())) < len(source)):
        return
    yield description(source, moved, noun), np.take(right, source, axis)


def description(source, moved, noun):
    """Describe an order in which part i is that of source[i], for the parts `moved` that are out of place.

    >>> description(np.array([0, 2, 1]), np.array([1, 2]), "head")
    'heads 1 and 2 are exchanged'
    >>> description(np.array([1, 1, 2]), np.array([0]), "slot")
    'slot 0 has the content of slot 1'
    """
    if len(moved) == 2 and source[moved[0]] == moved[1] and source[moved[1]] == moved[0]:
        return f"{noun}s {moved[0]} and {moved[1]} are exchanged"
    if len(moved) <= MOST:
        return ", ".join(f"{noun} {i} has the content of {noun} {source[i]}" for i in moved)
    return f"the {noun}s are in the order {', '.join(map(str, source[:8]))}{', ..' * (len(source) > 8)}"
