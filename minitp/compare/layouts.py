"""The possible layouts of an array: heads first or tokens first, heads concatenated, flat, transposed.

All layouts that the two shapes allow are found: the axes in any order, with neighboring axes merged. Axes of
size one are ignored.

    A is [H, T, d], B may be   [T, H, d]   [T, H*d]   [1, H, T, d]   [H*T*d]   ..
    A is [T, Hd], B may be     [T, H, d]   [H, T, d]   [1, T, Hd]   [Hd, T]   ..
"""

from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np

MOST_AXES = 5  # an array with more axes is tried only with its axes in the given order


@dataclass(frozen=True)
class Layout:
    """A layout of B, with the functions that make the two arrays comparable.

    Attributes
    ----------
    text : str
        A description; empty if B has A's layout.
    view : callable
        A function that gives B the shape of A, or of A's `part`.
    part : tuple of slice
        The part of A that B has, as an index; all of A by default.
    rest : str
        A description of what is not compared; empty if all of A and B is.
    sequence : int or None
        The index of the sequence that is compared, if B is a batch.
    """

    text: str
    view: Any
    part: tuple = (...,)
    rest: str = ""
    sequence: int | None = None

    def both(self, a, b):
        """Return the comparable parts of A's and B's arrays, two arrays of the same shape."""
        return a[self.part], self.view(b)

    @property
    def has_all_of_a(self):
        return self.part == (...,)

    def index(self, index):
        """Return the index in A's array of an element of its `part`."""
        if self.has_all_of_a:
            return index
        return tuple(i + (cut.start or 0) for i, cut in zip(index, self.part, strict=True))


def layouts(a_shape, b_shape, letters=None):
    """Return the Layouts that convert an array of `b_shape` into one of `a_shape`, the likeliest first.

    `letters` are the names of A's axes, if known. The list is empty if no layout fits.

    >>> [layout.text for layout in layouts((9, 4, 64), (4, 576), "H T d".split())]
    ['B is [T, H*d]', 'B is [T, d*H]']
    >>> layouts((4, 576), (1, 9, 4, 64), ["T", "Hd"])[0].text
    'B is [1, H, T, d]'
    """
    letters = letters or "ijklmnopqrstuvwxyz"[: len(a_shape)]
    if len(letters) != len(a_shape):
        return layouts(a_shape, b_shape)
    axes = [i for i, n in enumerate(a_shape) if n != 1]
    a = [a_shape[i] for i in axes]
    names = [letters[i] for i in axes]
    b = [n for n in b_shape if n != 1]
    found = [Layout("", lambda array: array)] if a_shape == b_shape else []
    for order in _orders(len(a)):  # B's axes are A's in this order, some merged
        groups = _merged([a[i] for i in order], b)
        if groups is None or (found and order == tuple(range(len(a)))):
            continue
        parts = ["*".join(names[order[i]] for i in group) for group in groups]
        found.append(Layout(_text(parts, b_shape, order), _unmerge(a_shape, a, order)))
    if len(b) > len(a):
        for order in _orders(len(b)):  # A's axes are B's in this order, some merged
            groups = _merged([b[i] for i in order], a)
            if groups is None:
                continue
            parts = [""] * len(b)
            for name, group in zip(names, groups, strict=True):
                for part, i in zip(_split(name, len(group)), group, strict=True):
                    parts[order[i]] = part
            found.append(Layout(_text(parts, b_shape), _merge(a_shape, b, order)))
    return found


def _orders(axes):
    return permutations(range(axes)) if axes <= MOST_AXES else [tuple(range(axes))]


def _merged(fine, coarse):
    """Return the indices in `fine` of neighbors whose product is each size in `coarse`, or None.

    >>> _merged([4, 9, 64], [4, 576])
    [[0], [1, 2]]
    """
    groups, i = [], 0
    for size in coarse:
        group, product = [], 1
        while product < size and i < len(fine):
            product *= fine[i]
            group.append(i)
            i += 1
        if product != size:
            return None
        groups.append(group)
    return groups if i == len(fine) else None


def _unmerge(a_shape, a, order):
    return lambda array: array.reshape([a[i] for i in order]).transpose(np.argsort(order)).reshape(a_shape)


def _merge(a_shape, b, order):
    return lambda array: array.reshape(b).transpose(order).reshape(a_shape)


def _split(name, parts):
    """Return names for the parts of a merged axis, such as H and d for 'Hd'."""
    if parts == 1:
        return [name]
    return list(name) if len(name) == parts else [f"{name}{i}" for i in range(parts)]


def _text(parts, b_shape, order=()):
    rest = iter(parts)
    transposed = "transposed, " if order == (1, 0) and len(parts) == 2 else ""
    return f"B is {transposed}[{', '.join('1' if n == 1 else next(rest) for n in b_shape)}]"
