"""The arrays of several ranks, put together by the sharding plan, so that a rank can be blamed."""

import math
import re
from itertools import accumulate, pairwise

import numpy as np

from minitp.check.difference import difference_of
from minitp.compare.files import Entry, TensorFile
from minitp.compare.fit import letters_of
from minitp.compare.layouts import layouts
from minitp.compare.pairing import same_name
from minitp.compare.partial import TABLES
from minitp.trace.names import WEIGHTS, Kind, kinds, split_name
from minitp.util.format import counted

COARSE_FIRST = ("bfloat16", "float16", "float32", "float64")


class AssembledFile(TensorFile):
    """The files of an engine's ranks as one file of whole arrays, in the shapes of A.

    A sharded array is put together by the plan, or if the ranks' sizes are others, one rank after another.
    Partial sums are added. Of numbers that several ranks should have, those that are furthest from A's are
    compared. If A has each rank's arrays, as `rank0/..`, those of the files are compared with them, too.

    Parameters
    ----------
    path : Path
    files : list of TensorFile
        The ranks' files, under A's names.
    a : TensorFile
        The reference, whose shapes say what a whole array is.
    plan : Plan
        The plan for as many ranks.
    head_dim : int
    """

    def __init__(self, path, files, a, plan, head_dim):
        self._files, self._a, self._plan = files, a, plan
        self._kinds, self._whole = kinds(plan, head_dim), {}  # name -> Kind of an array that fits A's
        entries, unfit = {}, {}
        for name in dict.fromkeys(name for file in files for name in file.entries):
            held = [file.entries.get(name) for file in files]
            shape = next(entry.shape for entry in held if entry)
            dtype = _coarsest([entry.dtype for entry in held if entry])
            if same_name(name, a.entries) is None:
                entries[name] = Entry(shape, dtype)
                continue
            kind = self._fitting_kind(name, held)
            if isinstance(kind, str):
                unfit[name] = shape, kind
                continue
            self._whole[name] = kind
            entries[name] = Entry(self._a_shape(name), dtype)
        for rank, file in enumerate(files):
            unfit |= {name: (shape, f"on rank {rank}, {why}") for name, (shape, why) in file.unfit.items()}
            for name, entry in file.entries.items():
                its_own = not (name.endswith("/logits") and self._is_sharded(name))
                if its_own and f"rank{rank}/{name}" in a.entries:
                    entries[f"rank{rank}/{name}"] = entry
        super().__init__(path, entries, files[0].metadata, unfit)

    def read(self, name):
        """Return an array in float64, whole if A has it."""
        match = re.fullmatch(r"rank(\d+)/(.*)", name)
        if match:
            return self._files[int(match[1])].read(match[2])
        if name not in self._whole:
            return next(file for file in self._files if name in file.entries).read(name)
        parts, expected = self._parts(name), self._expected(name)
        if self._whole[name].kind == "partial":
            return np.sum(parts, axis=0)
        whole = expected.copy()
        with np.errstate(invalid="ignore"):  # infinities, and NaN, which counts as far away
            for rank, part in enumerate(parts):
                index = self._index(name, rank)
                further = ~(np.abs(part - expected[index]) <= np.abs(whole[index] - expected[index]))
                whole[index] = np.where(further, part, whole[index])
        return whole

    def blame(self, name, tolerance):
        """Return which ranks have a part of an array that differs from A's; "" if it cannot be told."""
        if name not in self._whole or self._whole[name].kind == "partial" or len(self._files) == 1:
            return ""
        expected, found = self._expected(name), []
        for rank, part in enumerate(self._parts(name)):
            if not difference_of(part, expected[self._index(name, rank)]).relative <= tolerance:
                found.append(str(rank))
        if len(found) == len(self._files):
            return "on all ranks"
        return f"on rank{'s' * (len(found) > 1)} {', '.join(found)} only"

    def _a_shape(self, name):
        return self._a.entries[same_name(name, self._a.entries)].shape

    def _expected(self, name):
        return self._a.read(same_name(name, self._a.entries))

    def _is_sharded(self, name):
        return name in self._whole and self._whole[name].kind == "sharded"

    def _fitting_kind(self, name, held):
        """Return the Kind of an array that the shapes on all ranks fit, or a text that says why not.

        `held` has the Entry of each rank, or None if the rank lacks the array.
        """
        missing = [str(rank) for rank, entry in enumerate(held) if entry is None]
        if missing:
            return f"rank{'s' * (len(missing) > 1)} {', '.join(missing)} of {len(held)} has no such array"
        shape, kind = self._a_shape(name), self._planned_kind(name)
        found = [kind]
        if split_name(name)[2] == "logits":  # an engine may not gather them
            found.append(self._kinds["logits_partial"])
        if kind.kind == "sharded":  # or may give all ranks the whole
            found.append(Kind("replicated"))
        for one in found:
            if one.kind == "sharded":
                one = self._with_ranges(name, one, held)
            if one is not None and all(self._layouts(name, one, rank) for rank in range(len(held))):
                return one
        shapes = dict.fromkeys(str(list(entry.shape)) for entry in held)
        ranks = f"{counted(len(held), 'rank')} with {' and '.join(shapes)}"
        return f"A has {list(shape)} in all, and B {ranks}; is a file missing, or one too many?"

    def _planned_kind(self, name):
        if name.startswith(WEIGHTS):
            shard = self._plan.tensors.get(name.removeprefix(WEIGHTS))
            sharded = shard is not None and shard.axis is not None
            return Kind("sharded", shard.axis, shard.ranges) if sharded else Kind("replicated")
        return self._kinds.get(split_name(name)[2], Kind("replicated"))

    def _with_ranges(self, name, kind, held):
        """Return a sharded Kind with the ranges that the ranks' sizes suggest, or None."""
        shape = self._a_shape(name)
        if kind.axis >= len(shape) or 0 in shape:
            return None
        total = shape[kind.axis]
        row = math.prod(shape) // total
        sizes = [math.prod(entry.shape) // row for entry in held]
        if sizes == [stop - start for start, stop in kind.ranges]:
            return kind
        vocabulary = name in TABLES or (letters_of(name) or ["V"] * 9)[kind.axis] == "V"
        if sum(sizes) != total and not (vocabulary and sum(sizes) > total):  # an engine may pad it
            return None
        return Kind("sharded", kind.axis, tuple(pairwise(accumulate(sizes, initial=0))))

    def _layouts(self, name, kind, rank):
        shape = list(self._a_shape(name))
        if kind.kind == "sharded":
            start, stop = kind.ranges[rank]
            shape[kind.axis] = stop - start
        return layouts(tuple(shape), self._files[rank].entries[name].shape, letters_of(name))

    def _index(self, name, rank):
        """Return the index in A's array of what a rank has."""
        if not self._is_sharded(name):
            return (...,)
        kind = self._whole[name]
        return (*[slice(None)] * kind.axis, slice(*kind.ranges[rank]))

    def _parts(self, name):
        """Return each rank's array in A's layout; if several layouts fit the shape, the closest to A."""
        expected, parts, kind = self._expected(name), [], self._whole[name]
        for rank, file in enumerate(self._files):
            array, right = file.read(name), expected[self._index(name, rank)]
            views = [layout.view(array) for layout in self._layouts(name, kind, rank)]
            if kind.kind == "sharded":  # without the padding of the vocabulary
                views = [view.take(range(right.shape[kind.axis]), kind.axis) for view in views]
            parts.append(min(views, key=lambda view: difference_of(view, right).relative))
        return parts


def _coarsest(dtypes):
    """Return the coarsest of some dtypes, which decides the tolerance."""
    return next((dtype for dtype in COARSE_FIRST if dtype in dtypes), dtypes[0])
