"""The origin of the pieces of each rank: each is looked up in the checkpoint by its content."""

import re
from dataclasses import replace

import numpy as np

from minitp.lint.pieces import UNKNOWN, as_matrix, piece_hashes
from minitp.lint.tensors import HeldPieces
from minitp.lint.values import exact_change, similar_values
from minitp.mapping.table import GROUPED, PLAIN, EngineTensor

OWN, LAYER, ANYWHERE = range(3)  # the tensors that are searched
MISSES = 20  # shards that are searched everywhere in vain
ENOUGH = 0.5  # the share of a shard's pieces that must be found along an axis


class OriginSearch:
    """The search for the pieces of shards.

    Parameters
    ----------
    pieces : CheckpointPieces
    expectation : Expectation
    """

    def __init__(self, pieces, expectation):
        self.pieces, self.expectation = pieces, expectation
        self._misses = 0  # shards that were searched everywhere and not found

    def find(self, tensors, ranks, progress):
        """Enter what the ranks hold into some ShardedTensors; read one tensor of one rank at a time."""
        readers = {}
        for tensor in tensors:
            tensor.held = [None] * len(ranks)
            if tensor.by_name:
                self.expect(tensor)
            for rank in tensor.holders:
                readers.setdefault((tensor.entries[rank][0], rank), []).append(tensor)
        for (name, rank), of_name in readers.items():
            array = ranks[rank].read_as_stored(name)
            for tensor in of_name:
                index = tensor.entries[rank][1]
                own = array if index is None else array[index]
                tensor.held[rank] = self.held(own, tensor.layout.parts, tensor.expected[rank])
            progress(array.nbytes)

    def expect(self, tensor):
        """Enter the expected codes of a tensor."""
        axis = self.pieces.axis(tensor.layout.parts[0])
        sizes = [None if shape is None else shape[axis] for shape in tensor.shapes]
        tensor.expected = self.expectation.codes(tensor.layout, sizes)

    def identify(self, tensors, ranks, claimed, progress):
        """Find by content which tensors of the checkpoint some tensors hold, then what each rank holds.

        Parameters
        ----------
        tensors : list of ShardedTensor
            Tensors whose names explain nothing.
        ranks : list of FilesOfRank
        claimed : set of str
            The checkpoint's tensors that others hold; of equal tensors, another one is taken.
        progress : callable
        """
        for tensor in tensors:
            tensor.held = [None] * len(ranks)
            for rank in tensor.holders:
                array = ranks[rank].read_as_stored(tensor.entries[rank][0])
                tensor.held[rank] = self.held(array, self.pieces.names, None)
                progress(array.nbytes)
            codes = [tensor.held[rank].codes for rank in tensor.holders]
            found = self.pieces.names_in(np.concatenate(codes))
            if len(found) == 1:
                found = [self._unclaimed(found[0], claimed, array.dtype)]
            claimed.update(found)
            tensor.expected = [None] * len(ranks)
            if found:
                tensor.layout = self._layout(tuple(sorted(found, key=self.pieces.names.index)), codes)
                self.expect(tensor)
            if len(found) == 1:
                self._prefer_expected(tensor, ranks)

    def _unclaimed(self, name, claimed, dtype):
        """Return the first tensor that is equal to one of the checkpoint and that no other tensor holds."""
        axis = self.pieces.axis(name)
        for other in self.pieces.names if name in claimed else ():
            equal = self.pieces.shape(other) == self.pieces.shape(name) and np.array_equal(
                self.pieces.hashes(other, axis, dtype), self.pieces.hashes(name, axis, dtype)
            )
            if equal and other not in claimed:
                return other
        return name

    def _layout(self, parts, codes):
        """Return the layout that fits the codes of each rank, for a tensor that was found by content."""
        orders = {2: [(PLAIN, parts), (PLAIN, parts[::-1])], 3: [(PLAIN, parts), (GROUPED, parts)]}
        layouts = [EngineTensor(parts, order) for order, parts in orders.get(len(parts), [(PLAIN, parts)])]
        arranged = self.expectation.arranged
        fits = (one for one in layouts if all(np.array_equal(arranged(held, one), held) for held in codes))
        return next(fits, layouts[0])

    def _prefer_expected(self, tensor, ranks):
        """Take the expected pieces where they are equal to those that were found."""
        for rank in tensor.holders:
            held, expected = tensor.held[rank], tensor.expected[rank]
            if held.axis == held.source_axis == self.pieces.axis(tensor.layout.parts[0]):
                array = ranks[rank].read_as_stored(tensor.entries[rank][0])
                tensor.held[rank] = self.held(array, tensor.layout.parts, expected)

    def held(self, array, parts, expected):
        """Return the HeldPieces of a shard.

        The search ends where all pieces are found: first along the expected axis in the tensors that the
        shard should consist of, then in their layer, along the other axis and transposed, then everywhere.

        Parameters
        ----------
        array : array, [rows, columns] or [elements]
        parts : list of str
            The tensors that it should consist of.
        expected : array or None
            The codes that are expected.
        """
        natural, matrix = self.pieces.axis(parts[0]), as_matrix(array)
        if expected is not None and len(expected) != matrix.shape[natural]:
            expected = None
        best = HeldPieces(np.full(matrix.shape[natural], UNKNOWN), natural, natural)
        for where, names, axis, source_axis in self._searches(parts, natural):
            if where == ANYWHERE and self._misses > MISSES:
                break  # most weights are others than the checkpoint's
            hint = expected if axis == source_axis == natural else None
            found = self._found(array, names, axis, source_axis, hint)
            if found is not None and known(found) > max(known(best), 0 if hint is not None else ENOUGH):
                best = found
            if known(best) == 1 or not self._lost(best, expected).any():
                return best
            if where == OWN:
                changed = self._with_values(best, matrix, expected, exact_change)
                if changed.values:
                    return changed
        self._misses += known(best) < ENOUGH
        return self._with_values(best, matrix, expected, similar_values)

    def _searches(self, parts, natural):
        """Yield (where, names, axis of the shard, axis of the checkpoint), with the most likely first."""
        yield OWN, list(parts), natural, natural
        layer = [name for name in self.pieces.names if layer_of(name) == layer_of(parts[0])]
        other = 1 - natural
        for where, names in ((LAYER, layer), (ANYWHERE, self.pieces.names)):
            yield where, names, natural, natural
            yield where, names, other, other
            yield where, names, natural, other
            yield where, names, other, natural

    def _found(self, array, names, axis, source_axis, expected):
        """Return the HeldPieces for a search along an axis, or None if no tensor fits."""
        matrix, vector = as_matrix(array), array.ndim == 1
        width = matrix.shape[1 - axis]
        names = [
            name
            for name in names
            if self.pieces.shape(name)[1 - source_axis] == width and self.pieces.is_vector(name) == vector
        ]
        if not names or (vector and (axis, source_axis) != (0, 0)) or not matrix.shape[axis]:
            return None
        zero = hash(bytes(width * matrix.itemsize))
        hashes = piece_hashes(matrix, axis)
        if vector:
            codes = self._found_in_vectors(hashes, names, matrix.dtype, zero, expected)
        else:
            codes = self.pieces.search(hashes, names, source_axis, matrix.dtype, zero, expected)
        return None if codes is None else HeldPieces(codes, axis, source_axis)

    def _found_in_vectors(self, hashes, names, dtype, zero, expected):
        """Return the codes of a vector's elements, or None if the values may be equal by chance.

        Most values of a vector in 16 bits occur in many others, too. So the elements must follow one another
        as they do in the checkpoint.
        """
        right = None if expected is None else self.pieces.hashes_of(expected, 0, dtype, zero)
        if right is not None and not np.array_equal(right, hashes):
            codes = self.pieces.find_run(hashes, names, dtype)
            if codes is not None:
                return codes
        known_hashes = np.concatenate([self.pieces.hashes(name, 0, dtype) for name in names])
        if np.isin(hashes, [*known_hashes, zero]).all():
            codes = self.pieces.search(hashes, names, 0, dtype, zero, expected)
            return codes if np.array_equal(codes, expected) or in_runs(codes) else None
        return None if right is None else np.where(right == hashes, expected, UNKNOWN)

    def _lost(self, held, expected):
        """Return the pieces that are not found, except for any that follow the last of the vocabulary."""
        lost = held.codes == UNKNOWN
        return lost if expected is None or len(expected) != len(lost) else lost & (expected >= 0)

    def _with_values(self, held, matrix, expected, compare):
        """Return HeldPieces in which pieces of other values count as those expected, if they are similar."""
        changed, axis = self._lost(held, expected), held.axis
        if expected is None or len(expected) != len(changed) or not changed.any():
            return held
        found = (matrix if axis == 0 else matrix.T)[changed]
        right = self.pieces.values_of(expected[changed], axis, np.float64)
        text = compare(found, right) if found.shape == right.shape else ""
        if not text:
            return held
        return replace(held, codes=np.where(changed, expected, held.codes), values=text, changed=changed)


def known(held):
    """Return the share of a shard's pieces that are found; one of padding alone counts as found."""
    return float(np.mean(held.codes != UNKNOWN)) if len(held.codes) else 1.0


def in_runs(codes):
    """Return whether elements of a vector follow one another as in the checkpoint, not by chance."""
    steps = np.diff(codes[codes >= 0])
    return len(steps) < 4 or max(np.mean(steps == 1), np.mean(steps == steps[0])) > 0.5


def layer_of(name):
    """Return the number of a tensor's layer, or None."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return found and int(found[1])
