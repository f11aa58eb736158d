"""The recorded steps of one rank, in the shapes of `trace.names`."""

import numpy as np

from minitp.compare.fit import letters_of
from minitp.compare.heads import half_split, has_pairs
from minitp.compare.layouts import Layout
from minitp.judge.dump import is_exact_in
from minitp.judge.fitting import distinct_heads, expected_shape, fitting_layouts
from minitp.trace.names import INTEGERS, split_name

AS_IT_IS = Layout("", lambda array: array)
# The newest positions of a cache are the keys or values of the pass, if those were not recorded.
NEWEST_OF = {"attn.k_rope": "attn.k_cache", "attn.v": "attn.v_cache"}


class RankSteps:
    """The recorded steps of one rank.

    Parameters
    ----------
    file : RankFile
    rank : int
    kinds : dict of str to Kind
        The distribution of each step over the ranks.
    passes : dict of str to RecordedPass
    own, whole : dict of str to int
        The sizes of this rank's part of each axis, and of the whole axes; see `fitting`.
    dtype : numpy dtype
        The dtype of the engine.
    dtype_is_given : bool
        Whether all arrays are converted to this dtype; otherwise an array keeps its own, unless the engine's
        dtype has 16 bits and all numbers of the array.
    rotary_dim : int or None
        The number of rotated dimensions of interleaved heads; None if the heads are half-split.

    Attributes
    ----------
    names : dict of str to Entry
        The arrays that can be judged.
    unfit : dict of str to (list of int, list of int)
        The arrays whose shapes fit no layout of their steps, with their shapes and the expected ones.
    """

    def __init__(
        self, file, rank, kinds, passes, own, whole, dtype=None, dtype_is_given=False, rotary_dim=None
    ):
        self.path, self.rank, self._file, self._kinds, self._passes = file.path, rank, file, kinds, passes
        self._own, self._whole, self._rotary_dim = own, whole, rotary_dim
        self._dtype, self._dtype_is_given = dtype, dtype_is_given
        self._layouts = {}  # name -> the Layouts that fit, the chosen one first
        self.names, self.unfit = {}, {}
        for name, entry in file.entries.items():
            pass_name, _, step = split_name(name)
            letters = letters_of(name)
            if step not in kinds or pass_name not in passes:
                self.names[name] = entry
                continue
            sizes = letters, passes[pass_name], own
            fitting = fitting_layouts(name, entry, *sizes, whole)
            self._layouts[name] = [each for each in fitting if self._has_distinct_heads(name, letters, each)]
            if self._layouts[name]:
                self.names[name] = entry
            else:
                self.unfit[name] = list(entry.shape), expected_shape(name, entry, *sizes)

    def __contains__(self, name):
        return self._source(name) in self.names

    def layouts(self, name):
        """Return the Layouts that give an array the shape of its step, the likeliest first."""
        return self._layouts.get(self._source(name), [AS_IT_IS])

    def choose(self, name, layout):
        """Give `read` another layout of an array than the likeliest one."""
        self._layouts[self._source(name)] = [layout]

    def read(self, name, layout=None):
        """Return this rank's array of a step in the dtype in which it was recorded.

        Of an array of which every rank has the whole, it is this rank's range.
        """
        source, step = self._source(name), split_name(name)[2]
        layout = layout or self.layouts(name)[0]
        array = layout.view(self._file.read(source))
        array = array.astype(self._dtype_of(source, step, array))
        if self._rotary_dim is not None and has_pairs(source):
            array = half_split(array, self._rotary_dim)
        if (letters_of(source) or " ")[0] == "K":
            array = self._without_copies(array)  # [K_r, n, d]
        array, pass_ = self._own_range(step, array), self._passes[name.rpartition("/")[0]]
        if source != name:
            array = array[:, pass_.start - pass_.stop :]  # [K_r, T, d]
        if step == "final_norm" and len(array) > pass_.logit_rows > 0:  # logits of the last positions alone
            array = array[-pass_.logit_rows :]  # [n, D]
        return array

    def _has_distinct_heads(self, name, letters, layout):
        """Return whether an array of KV heads has each of them once, or only equal copies of them."""
        allowed = self._own["K"], self._whole["K"]
        shape = layout.view(np.broadcast_to(False, self._file.entries[name].shape)).shape
        if letters[0] != "K" or shape[0] in allowed:
            return True
        return len(self._without_copies(layout.view(self._file.read(name)))) in allowed

    def _without_copies(self, array):
        """Return KV heads [n, S, d] without the copies of a head for several query heads."""
        for heads in (self._own["K"], self._whole["K"]):
            found = distinct_heads(array, heads)  # [heads, S, d]
            if found is not None:
                return found
        return array

    def _source(self, name):
        """Return the name of the array that has a step: its own, or that of a cache."""
        pass_name, _, step = name.rpartition("/")
        for new, cache in NEWEST_OF.items():
            if name not in self.names and step.endswith(new):
                return f"{pass_name}/{step.removesuffix(new)}{cache}"
        return name

    def _dtype_of(self, name, step, array):
        recorded = np.dtype(self.names[name].dtype)
        if step in INTEGERS:
            return np.dtype(np.int64)
        if recorded.kind in "biu":
            return recorded
        if self._dtype_is_given or (self._dtype.itemsize == 2 and is_exact_in(array, self._dtype)):
            return self._dtype
        return recorded

    def _own_range(self, step, array):
        kind = self._kinds[step]
        if kind.kind != "sharded" or array.ndim <= kind.axis:
            return array
        start, stop = kind.ranges[self.rank]
        whole = kind.ranges[-1][1]
        if array.shape[kind.axis] != whole or stop - start == whole:
            return array
        return array[(slice(None),) * kind.axis + (slice(start, stop),)]
