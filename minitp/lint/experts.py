"""The numbers of the experts that a rank holds: some engines count them from 0 on each rank."""

import re

import numpy as np

from minitp.lint.pieces import as_matrix, piece_hashes
from minitp.lint.words import numbers_text

EXPERT = re.compile(r"model\.layers\.(\d+)\..*\.experts\.(\d+|\{n\})\.")

NUMBER = re.compile(r"\.experts\.(\d+|\{n\})\.")


class ExpertNumbers:
    """The number in the checkpoint of each expert that a rank holds.

    With expert parallelism, a rank holds some of the experts. If it counts them from 0, each is found by its
    content; if that fails, the ranks are assumed to hold contiguous ranges.

    Parameters
    ----------
    ranks : list of FilesOfRank
    layouts : dict of str to EngineTensor or None
        The layout of each tensor by the engine's name.
    pieces : CheckpointPieces
    experts : int
        The number of experts in a layer.
    """

    def __init__(self, ranks, layouts, pieces, experts):
        self._ranks, self._pieces, self._experts = ranks, pieces, experts
        self._tensors = [{} for _ in ranks]  # (layer, own number) -> (name, index in a stack or None, layout)
        self._numbers = {}
        for own, rank in zip(self._tensors, ranks, strict=True):
            for name, entry in rank.entries.items():
                found = layouts.get(name) and EXPERT.match(layouts[name].parts[0])
                if not found:
                    continue
                stacked = found[2] == "{n}"
                for number in range(entry.shape[0]) if stacked else [int(found[2])]:
                    key = int(found[1]), number
                    own.setdefault(key, (name, number if stacked else None, layouts[name]))

    def number(self, rank, part, own):
        """Return the checkpoint's number of an expert.

        Parameters
        ----------
        rank : int
        part : str
            The checkpoint's name of a tensor of the expert's layer.
        own : int
            The number that the rank gives to the expert.
        """
        layer = int(EXPERT.match(part)[1])
        if (rank, layer) not in self._numbers:
            self._numbers[rank, layer] = self._of_layer(rank, layer)
        return self._numbers[rank, layer][own]

    def unusual_order(self, layer):
        """Return the experts of each rank as text, or "" if an engine can know them from the rank.

        It can if the names have the checkpoint's numbers, or the ranks have contiguous ranges in rank
        order, or they take turns. Ranks that have the same experts count as one.
        """
        ranks = [self._numbers.get((rank, layer), {}) for rank in range(len(self._ranks))]
        if all(own == number for numbers in ranks for own, number in numbers.items()):
            return ""
        orders = list(dict.fromkeys(tuple(numbers.values()) for numbers in ranks if numbers))
        in_turn = [tuple(range(first, self._experts, len(orders))) for first in range(len(orders))]
        if sum(orders, ()) == tuple(range(self._experts)) or orders == in_turn:
            return ""
        return " | ".join(map(numbers_text, orders))

    def _of_layer(self, rank, layer):
        """Return own number -> the checkpoint's number, for the experts of a layer."""
        own = sorted(number for at, number in self._tensors[rank] if at == layer)
        if len(own) >= self._experts or own != list(range(len(own))) or len(self._ranks) == 1:
            return {number: number for number in own}
        name, arrays, found = None, None, []
        for number in own:
            new, index, layout = self._tensors[rank][layer, number]
            arrays = arrays if new == name else self._ranks[rank].read_as_stored(new)
            name = new
            found.append(self._by_content(arrays if index is None else arrays[index], layout.parts[0]))
        if None in found or len(set(found)) < len(found):
            first = rank * len(own)
            found = [min(first + number, self._experts - 1) for number in own]
        return dict(zip(own, found, strict=True))

    def _by_content(self, array, part):
        """Return the number of the expert that has the most pieces of a tensor, or None."""
        matrix, template = as_matrix(array), NUMBER.sub(".experts.{n}.", part)
        names = [template.format(n=number) for number in range(self._experts)]
        axis, width = self._pieces.axis(names[0]), self._pieces.shape(names[0])
        if matrix.shape[1 - axis] != width[1 - axis]:
            return None
        zero = hash(bytes(matrix.shape[1 - axis] * matrix.itemsize))
        codes = self._pieces.search(piece_hashes(matrix, axis), names, axis, matrix.dtype, zero)
        counts = [len(self._pieces.pieces_of(name, codes)) for name in names]
        return int(np.argmax(counts)) if max(counts) else None
