"""The layouts that give a recorded array the shape of its step, as in `compare`, and what they leave out.

Left out are copies of KV heads that are repeated for the query heads, slots of a cache that are not used yet,
the probabilities and scores of these slots, and the padding of the vocabulary.
"""

from dataclasses import replace

import numpy as np

from minitp.compare.layouts import layouts
from minitp.judge.sizes import padded_width, shape_of


def fitting_layouts(name, entry, letters, pass_, own, whole):
    """Return the Layouts that give an array the shape of its step, the likeliest first; [] if none do.

    Parameters
    ----------
    name : str
    entry : Entry
    letters : list of str
        The letters of the step's axes.
    pass_ : RecordedPass
    own, whole : dict of str to int
        The sizes of a rank's own part of each axis, and those of the whole axes, of which a rank may have
        all.
    """
    count, found = int(np.prod(entry.shape)), {}
    if letters == ["T", "V"] and (width := padded_width(entry, own["V"])) > own["V"]:
        padded = layouts((count // width, width), entry.shape, letters)
        return [cut(layout, 1, own["V"]) for layout in padded]
    for sizes in axis_sizes(letters, own, whole):
        shape = shape_of(name, sizes, pass_.stop - pass_.start, count, letters)
        unused = "S" in letters and shape[letters.index("S")] > pass_.stop
        found.setdefault(unused, []).extend(layouts(shape, entry.shape, letters))
    if found.get(False):
        return found[False]
    return [cut(layout, letters.index("S"), pass_.stop) for layout in found.get(True, [])]


def axis_sizes(letters, own, whole):
    """Yield the sizes that a rank's array may have: its own, those of whole axes, and of repeated heads."""
    yield own
    for letter in whole:
        if letter in letters or f"{letter}d" in letters:
            others = (whole[letter], own["H"], whole["H"]) if letter == "K" else (whole[letter],)
            yield from (own | {letter: size} for size in dict.fromkeys(others) if size != own[letter])


def cut(layout, axis, stop):
    """Return a Layout that takes the first elements of an axis, up to `stop`."""
    return replace(layout, view=lambda array: layout.view(array)[(slice(None),) * axis + (slice(stop),)])


def expected_shape(name, entry, letters, pass_, own):
    """Return the shape that an array which fits no layout should have."""
    sizes = shape_of(name, own, pass_.stop - pass_.start, int(np.prod(entry.shape)), letters)
    return [pass_.stop if letter == "S" else size for letter, size in zip(letters, sizes, strict=True)]


def distinct_heads(array, heads):
    """Return the KV heads [K, S, d] of which an array [n, S, d] has copies; None if it has not.

    Copies follow each other (h div n/K) or the heads as a whole are repeated (h mod K).

    >>> distinct_heads(np.array([[1], [1], [2], [2]]), 2).tolist()
    [[1], [2]]
    >>> distinct_heads(np.array([[1], [1], [2], [3]]), 2)
    """
    if len(array) == heads or not heads or len(array) % heads:
        return array if len(array) == heads else None
    for axis, groups in ((1, (heads, -1)), (0, (-1, heads))):
        copies = array.reshape(*groups, *array.shape[1:])
        first = copies.take([0], axis)
        if np.array_equal(np.broadcast_to(first, copies.shape), copies, equal_nan=True):
            return first.squeeze(axis)
    return None
