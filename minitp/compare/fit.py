"""The layouts in which each pair of arrays can be compared, and the pairs that cannot."""

from dataclasses import replace

from minitp.compare.heads import PROJECTIONS, has_pairs, to_half_split
from minitp.compare.layouts import layouts
from minitp.compare.partial import partial_layouts, reason
from minitp.compare.result import NotCompared
from minitp.errors import InputError
from minitp.trace.names import AFTER, BEFORE, LAYER, split_name


def fit(a, b, pairs, rope, metadata):
    """Return the Layouts of each pair by A's name, and a NotCompared for each pair that has none.

    Parameters
    ----------
    a, b : TensorFile
    pairs : dict of str to str
        Names in A to names in B.
    rope : str or None
        The RoPE layout of B's heads; interleaved heads are converted to half-split ones.
    metadata : TraceMetadata or None
        The metadata of A.

    Raises
    ------
    InputError
        if no pair has a layout.
    """
    found, not_compared = {}, []
    head_dim = _head_dim(a, metadata)
    rotary_dim = metadata and metadata.config.rotary_dim  # None: all of a head
    for name, partner in pairs.items():
        shapes = a.entries[name].shape, b.entries[partner].shape
        letters = letters_of(name)
        fitting, why = layouts(*shapes, letters) or partial_layouts(name, *shapes, letters), ""
        if not fitting:
            why = reason(*shapes, letters)
        elif rope == "interleaved" and has_pairs(name):
            if name.endswith(PROJECTIONS) and head_dim is None:
                fitting, why = [], "--rope needs the head size, which is in the traces of minitp"
            fitting = [_converted(layout, name, head_dim, rotary_dim) for layout in fitting]
        if fitting:
            found[name] = fitting
        else:
            not_compared.append(NotCompared(name, partner, *shapes, why))
    if not found:
        first = not_compared[0]
        raise InputError(
            f"{a.path} and {b.path} have no array that can be compared: {first}"
            + (f", and {len(not_compared) - 1} more" if len(not_compared) > 1 else "")
        )
    return found, not_compared


def letters_of(name):
    """Return the letters of a step's axes from the tables of `trace.names`; None for an unknown name."""
    letters = (BEFORE | LAYER | AFTER).get(split_name(name)[2])
    return letters and letters.split()


def _head_dim(a, metadata):
    """Return d, the size of a head, from A's metadata or from its first array of heads; None if unknown."""
    if metadata is not None:
        return metadata.config.head_dim
    heads = (entry.shape for name, entry in a.entries.items() if (letters_of(name) or " ")[-1] == "d")
    return next((shape[-1] for shape in heads if shape), None)


def _converted(layout, name, *dims):
    """Return a Layout that also converts interleaved heads to half-split ones; see `to_half_split`."""
    text = f"{layout.text}, interleaved" if layout.text else "B is interleaved"
    return replace(layout, text=text, view=lambda array: to_half_split(name, layout.view(array), *dims))
