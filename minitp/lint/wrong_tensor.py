"""A wrong tensor, as the functions that name mistakes see it."""

from dataclasses import replace

import numpy as np

from minitp.lint.words import held_text

SHOWN = 3  # ranks that a description lists


class WrongTensor:
    """A wrong tensor, with what its ranks hold and should hold.

    Attributes
    ----------
    found : list of array
        The codes that each holder has.
    right : list of array
        The codes that each should have; empty if that is not known.
    along : bool
        Whether all shards have the pieces along the axis that should be split.
    word : str
        The noun for the pieces: rows, columns or elements.
    """

    def __init__(self, tensor, pieces, expectation):
        self.tensor, self.pieces, self.expectation = tensor, pieces, expectation
        self.ranks, self.layout = tensor.holders, tensor.layout
        self.held = [tensor.held[rank] for rank in self.ranks]
        self.found = [held.codes for held in self.held]
        right = [tensor.expected[rank] for rank in self.ranks]
        self.right = right if all(codes is not None for codes in right) else []
        axis = pieces.axis(self.layout.parts[0])
        self.along = all(held.axis == held.source_axis == axis for held in self.held)
        self.word = f"{pieces.word(self.layout.parts[0])}s"

    def fits(self, codes):
        """Return whether each holder has these codes."""
        if not self.along or len(codes) != len(self.found) or any(one is None for one in codes):
            return False
        return all(np.array_equal(one, other) for one, other in zip(codes, self.found, strict=True))


def described(case):
    """Return what the wrong ranks hold, and what they should hold."""
    texts = []
    for i, held in enumerate(case.held):
        right = case.right[i] if case.right else None
        if right is not None and np.array_equal(held.codes, right):
            continue
        text = f"rank {case.ranks[i]} has {held_text(held, case.layout, case.pieces)}"
        if right is not None:
            expected = replace(held, codes=right, source_axis=case.pieces.axis(case.layout.parts[0]))
            text += f", expected {held_text(expected, case.layout, case.pieces)}"
        texts.append(text)
    return "; ".join(texts[:SHOWN]) + ("; .." if len(texts) > SHOWN else "")
