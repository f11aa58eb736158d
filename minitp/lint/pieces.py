"""The rows and columns of the checkpoint's tensors, found by their content.

A *piece* is a row or a column of a tensor, or an element of a vector. Each has a hash of its bytes in the
dtype of the shard that is looked for. A piece of a shard is described by a code: the number of the checkpoint
tensor and the number of the piece in it, in one integer.
"""

import functools

import numpy as np

PADDING, UNKNOWN = -1, -2  # codes of a piece of zeros, and of a piece that the checkpoint does not have
SHIFT = 32  # a code is (tensor << SHIFT) + piece
BLOCK = 1 << 24  # bytes that are hashed at a time
FIRST = "model.embed_tokens"  # the tensors of a plan outside the layers come before those of the layers
AHEAD = 8  # pieces that are compared to choose between equal ones


def piece_hashes(array, axis):
    """Return a hash of the bytes of each row (axis 0) or column (axis 1) of a matrix, [n] int64."""
    rows = np.ascontiguousarray(array if axis == 0 else array.T)
    width = rows.shape[1] * rows.itemsize
    if width == 0:
        return np.zeros(len(rows), np.int64)
    hashes, step = np.empty(len(rows), np.int64), max(1, BLOCK // width)
    for start in range(0, len(rows), step):
        block = rows[start : start + step].view(f"V{width}").ravel().tolist()
        hashes[start : start + step] = np.fromiter(map(hash, block), np.int64, len(block))
    return hashes


def as_matrix(array):
    """Return a matrix unchanged, and a vector as a matrix of one column."""
    return array if array.ndim == 2 else array.reshape(-1, 1)


class CheckpointPieces:
    """The pieces of all tensors of a checkpoint, hashed when they are first needed.

    Attributes
    ----------
    names : list of str
        The tensors that the model's plan lists; a code has the index of one of them.
    """

    def __init__(self, source):
        self._source, self._hashes = source, {}
        self._tensors = source.plan.tensors
        self.names = sorted(
            self._tensors, key=lambda name: (not name.startswith(FIRST), ".layers." not in name)
        )
        self._index = {name: i for i, name in enumerate(self.names)}

    def __contains__(self, name):
        return name in self._index

    def shape(self, name):
        """Return a tensor's shape as a matrix."""
        shape = self._tensors[name].shape
        return shape if len(shape) == 2 else (*shape, 1)

    def is_vector(self, name):
        """Return whether a tensor has one axis."""
        return len(self._tensors[name].shape) == 1

    def axis(self, name):
        """Return the axis along which a tensor is split over ranks; 0 if it is not split."""
        return self._tensors[name].axis or 0

    def word(self, name, axis=None):
        """Return the noun for a tensor's pieces along an axis, by default the one that is split."""
        if self.is_vector(name):
            return "element"
        return ("row", "column")[self.axis(name) if axis is None else axis]

    def is_split(self, name):
        """Return whether a tensor is split over ranks."""
        return self._tensors[name].axis is not None

    def count(self, name, axis=None):
        """Return the number of a tensor's pieces along an axis, by default the one that is split."""
        return self.shape(name)[self.axis(name) if axis is None else axis]

    def read(self, name, dtype):
        """Return a whole tensor as a matrix, rounded to a dtype."""
        whole = tuple(slice(0, n) for n in self._tensors[name].shape)
        with np.errstate(over="ignore"):  # large values become infinite, as in the engine
            return as_matrix(np.asarray(self._source.tensors.read(name, whole)).astype(dtype, copy=False))

    def hashes(self, name, axis, dtype):
        """Return the hashes of a tensor's pieces along an axis, [n] int64."""
        key = name, axis, dtype
        if key not in self._hashes:
            self._hashes[key] = piece_hashes(self.read(name, dtype), axis)
        return self._hashes[key]

    def codes(self, name, pieces):
        """Return the codes of some pieces of a tensor."""
        return (self._index[name] << SHIFT) + np.asarray(pieces, np.int64)

    def names_in(self, codes):
        """Return the names of the tensors that some codes come from, in the order of their first pieces."""
        tensors = (codes[codes >= 0] >> SHIFT).tolist()
        return [self.names[i] for i in dict.fromkeys(tensors)]

    def pieces_of(self, name, codes):
        """Return the numbers of the pieces among `codes` that come from one tensor, in order."""
        return piece_numbers(codes[(codes >= 0) & (codes >> SHIFT == self._index[name])])

    def hashes_of(self, codes, axis, dtype, zero):
        """Return the hash of each code; that of PADDING is `zero`."""
        found = np.full(len(codes), zero, np.int64)
        for name in self.names_in(codes):
            of_tensor = (codes >= 0) & (codes >> SHIFT == self._index[name])
            found[of_tensor] = self.hashes(name, axis, dtype)[piece_numbers(codes[of_tensor])]
        return found

    def values_of(self, codes, axis, dtype):
        """Return the pieces with some codes as rows of a matrix, [n, width]; those of PADDING are zeros."""
        names = self.names_in(codes)
        width = self.shape(names[0])[1 - axis] if names else 0
        values = np.zeros((len(codes), width), dtype)
        for name in names:
            of_tensor = (codes >= 0) & (codes >> SHIFT == self._index[name])
            tensor = self.read(name, dtype)
            rows = tensor if axis == 0 else tensor.T
            values[of_tensor] = rows[piece_numbers(codes[of_tensor])]
        return values

    def search(self, found, names, axis, dtype, zero, hint=None):
        """Return the code of each hash in `found`, or UNKNOWN.

        Of equal pieces, the one that `hint` expects is chosen, or else the one that continues the pieces
        before it. A piece of zeros that neither explains is PADDING.

        Parameters
        ----------
        found : array
            Hashes, [n].
        names : list of str
            The tensors to search, with the most likely first.
        axis : int
            The axis of these tensors along which the pieces lie.
        dtype : dtype
        zero : int
            The hash of a piece of zeros.
        hint : array or None
            The codes that are expected, [n].
        """
        result = np.full(len(found), UNKNOWN, np.int64)
        if hint is not None:
            matches = self.hashes_of(hint, axis, dtype, zero) == found
            result[matches] = hint[matches]
        hashes, codes = self._sorted(tuple(names), axis, dtype)
        left, right = (np.searchsorted(hashes, found, side) for side in ("left", "right"))
        clear = (result == UNKNOWN) & (right - left == 1) & (found != zero)
        result[clear] = codes[left[clear]]
        for i in np.flatnonzero((result == UNKNOWN) & ((right > left) | (found == zero))):
            options = codes[left[i] : min(right[i], left[i] + 64)].tolist()
            if i and result[i - 1] >= 0 and self._continues(result[i - 1] + 1, found[i], axis, dtype):
                result[i] = result[i - 1] + 1
            elif found[i] == zero:
                result[i] = PADDING
            else:
                result[i] = self._longest(options, found[i : i + AHEAD], axis, dtype)
        return result

    def find_run(self, found, names, dtype):
        """Return the codes of the first place where all hashes follow one another in a vector, or None."""
        for name in names:
            hashes, count = self.hashes(name, 0, dtype), len(found)
            for start in np.flatnonzero(hashes[: len(hashes) - count + 1] == found[0]) if count else ():
                if np.array_equal(hashes[start : start + count], found):
                    return self.codes(name, np.arange(start, start + count))
        return None

    @functools.lru_cache(maxsize=16)  # noqa: B019  one object, which lives as long as the command
    def _sorted(self, names, axis, dtype):
        """Return the hashes of all pieces of some tensors, sorted, and their codes."""
        hashes = np.concatenate([self.hashes(name, axis, dtype) for name in names])
        codes = np.concatenate([self.codes(name, np.arange(self.count(name, axis))) for name in names])
        order = np.argsort(hashes, kind="stable")
        return hashes[order], codes[order]

    def _continues(self, code, value, axis, dtype):
        """Return whether a code is that of a piece with a given hash."""
        tensor, piece = code >> SHIFT, code & ((1 << SHIFT) - 1)
        hashes = self.hashes(self.names[tensor], axis, dtype)
        return piece < len(hashes) and hashes[piece] == value

    def _longest(self, options, ahead, axis, dtype):
        """Return the option from which the most of the next hashes follow one after another."""

        def length(code):
            steps = range(len(ahead))
            return next(
                (n for n in steps if not self._continues(code + n, ahead[n], axis, dtype)), len(ahead)
            )

        return max(options, key=length)


def piece_numbers(codes):
    """Return the number in its tensor of each piece."""
    return codes & ((1 << SHIFT) - 1)
