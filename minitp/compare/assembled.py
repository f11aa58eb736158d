"""The arrays of several ranks, put together by the sharding plan, so that a rank can be blamed."""

import re

import numpy as np

from minitp.check.difference import difference_of
from minitp.compare.files import Entry, TensorFile
from minitp.compare.fit import letters_of
from minitp.compare.layouts import layouts
from minitp.trace.names import WEIGHTS, Kind, kinds, split_name


class AssembledFile(TensorFile):
    """The files of an engine's ranks as one file of whole arrays, in the shapes of A.

    A sharded array is put together by the plan, and partial sums are added. Of an array that all ranks should
    have, the one that is furthest from A's is compared. If A has each rank's arrays, as `rank0/..`, those of
    the files are compared with them, too.

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
        entries = {}
        for name, entry in files[0].entries.items():
            kind = self._fitting_kind(name) if name in a.entries else None
            if kind is not None:
                self._whole[name] = kind
                entry = Entry(a.entries[name].shape, entry.dtype)
            entries[name] = entry
        for rank, file in enumerate(files):
            for name, entry in file.entries.items():
                its_own = not (name.endswith("/logits") and self._is_sharded(name))
                if its_own and f"rank{rank}/{name}" in a.entries:
                    entries[f"rank{rank}/{name}"] = entry
        super().__init__(path, entries, files[0].metadata)

    def read(self, name):
        """Return an array in float64: a whole one, or if it does not fit A's shape, that of rank 0."""
        match = re.fullmatch(r"rank(\d+)/(.*)", name)
        if match:
            return self._files[int(match[1])].read(match[2])
        if name not in self._whole:
            return self._files[0].read(name)
        kind, parts = self._whole[name], self._parts(name)
        if kind.kind == "partial":
            return np.sum(parts, axis=0)
        if kind.kind == "replicated":
            expected = self._a.read(name)
            return max(parts, key=lambda part: difference_of(part, expected).relative)
        whole = np.zeros(self._a.entries[name].shape)
        for rank, part in enumerate(parts):
            whole[self._index(name, rank)] = part
        return whole

    def blame(self, name, tolerance):
        """Return which ranks have a part of an array that differs from A's; "" if it cannot be told."""
        if name not in self._whole or self._whole[name].kind == "partial":
            return ""
        expected, found = self._a.read(name), []
        for rank, part in enumerate(self._parts(name)):
            if not difference_of(part, expected[self._index(name, rank)]).relative <= tolerance:
                found.append(str(rank))
        if len(found) == len(self._files):
            return "on all ranks"
        return f"on rank{'s' * (len(found) > 1)} {', '.join(found)} only"

    def _is_sharded(self, name):
        return name in self._whole and self._whole[name].kind == "sharded"

    def _fitting_kind(self, name):
        """Return the Kind of an array if the shapes on all ranks fit it, else None."""
        if name.startswith(WEIGHTS):
            shard = self._plan.tensors.get(name.removeprefix(WEIGHTS))
            kind = "replicated" if shard is None or shard.axis is None else "sharded"
            found = [shard and Kind(kind, shard.axis, shard.ranges)]
        else:
            step = split_name(name)[2]
            found = [self._kinds.get(step)]
            if step == "logits":  # an engine may not gather them
                found.append(self._kinds["logits_partial"])
        ranks = range(len(self._files))
        for kind in filter(None, found):
            if all(name in file.entries for file in self._files) and all(
                self._layouts(name, rank, kind) for rank in ranks
            ):
                return kind
        return None

    def _layouts(self, name, rank, kind):
        shape = list(self._a.entries[name].shape)
        if kind.kind == "sharded" and kind.axis < len(shape):
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
        expected, parts = self._a.read(name), []
        for rank, file in enumerate(self._files):
            array, part = file.read(name), expected[self._index(name, rank)]
            views = [layout.view(array) for layout in self._layouts(name, rank, self._whole[name])]
            parts.append(min(views, key=lambda view: difference_of(view, part).relative))
        return parts
