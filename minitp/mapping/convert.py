"""The conversion of an array from an engine's layout to that of a step."""

import numpy as np

from minitp.trace.names import AFTER, BEFORE, LAYER


def letters_of(step):
    """Return the letters of a step's axes."""
    return (BEFORE | LAYER | AFTER)[step].split()


def to_step(step, array, layout, sizes):
    """Convert an array from an engine's layout to that of a step.

    Parameters
    ----------
    step : str
    array : array
    layout : str
        The letters of the array's axes.
    sizes : dict of str to int
        The size of each letter that is part of a joined axis.

    >>> to_step("attn.q", np.zeros((1, 5, 12)), "1 T Hd", {"H": 3, "d": 4}).shape
    (3, 5, 4)
    """
    axes, shape = [], []
    for name, size in zip(layout.split(), array.shape, strict=True):
        parts = list(name) if len(name) == 2 and name not in letters_of(step) else [name]
        axes += parts
        shape += [sizes[part] for part in parts] if len(parts) > 1 else [size]
    array = array.reshape(shape)
    keep = [axis for axis, name in enumerate(axes) if name != "1"]
    array = array.reshape([shape[axis] for axis in keep])
    axes = [axes[axis] for axis in keep]
    return np.ascontiguousarray(array.transpose([axes.index(name) for name in letters_of(step)]))


def split_joined(steps, array, sizes):
    """Split an array along its last axis into those of the steps that it joins; yield (step, array)."""
    letters = {"attn.q": "H", "attn.k": "K", "attn.v": "K"}
    start = 0
    for step in steps:
        width = sizes[letters[step]] * sizes["d"] if step in letters else array.shape[-1] // len(steps)
        yield step, array[..., start : start + width]
        start += width


def half_split(x, rotary_dim=None):
    """Move the pairs (x[2i], x[2i + 1]) of the last axis R/2 apart: [.., d] -> [.., d].

    R is `rotary_dim`, by default d.

    >>> half_split(np.arange(6)).tolist(), half_split(np.arange(6), 4).tolist()
    ([0, 2, 4, 1, 3, 5], [0, 2, 1, 3, 4, 5])
    """
    turned, rest = np.split(x, [rotary_dim or x.shape[-1]], axis=-1)  # [.., R], [.., d - R]
    return np.concatenate((turned[..., ::2], turned[..., 1::2], rest), axis=-1)
