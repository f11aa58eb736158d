"""The recordings whose bits are compared: the steps of one sequence, in passes over its positions."""

import re
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass

from minitp.bits.names import BATCH, LETTERS, steps_of
from minitp.compare.files import open_dump
from minitp.compare.pairing import MAY_DIFFER, differing, pass_order, read_metadata
from minitp.errors import InputError, shown
from minitp.trace.names import AFTER, split_name
from minitp.util.format import counted

NEIGHBOR = "neighbor."  # beginning of the pass names of the other sequences of a batch


@dataclass(frozen=True)
class PassRows:
    """A forward pass: its name, the positions of the sequence in it, and the rows that it computes.

    Attributes
    ----------
    name : str
    start, stop : int
        The positions of the sequence's tokens.
    rows : int
        The number of tokens of all sequences in the pass, with padding.
    count, sequence : int
        The number of sequences in the arrays of a dump, and the index of this one.
    before, after : int
        The number of rows of padding before the sequence's tokens and after them.
    holes : bool
        Whether there is padding between the keys, so that the positions of the keys are unknown.
    """

    name: str
    start: int
    stop: int
    rows: int
    count: int = 1
    sequence: int = 0
    before: int = 0
    after: int = 0
    holes: bool = False

    @property
    def width(self):
        """The number of rows of the sequence, with padding."""
        return self.before + self.stop - self.start + self.after


@dataclass(frozen=True)
class RankRecording:
    """The passes that a rank has recorded in its StepFile.

    Attributes
    ----------
    steps : StepFile
    passes : list of PassRows
    tp : int
    windows : list of (int or None)
        The sliding window of each layer.
    progress : callable
        A function that is called after each layer.
    """

    steps: object
    passes: list
    tp: int
    windows: list
    progress: Callable = lambda: None
    others = ()
    split = None  # the other recording is of the same ranks

    @property
    def layers(self):
        return len(self.windows)

    @property
    def has_all_ranks(self):
        """True if the arrays are not only the rank's part of them."""
        return self.tp == 1

    def __contains__(self, name):
        return name in self.steps

    def read(self, name):
        return self.steps.read(name)

    def letters(self, name):
        """Return the letters of the axes of a step's array."""
        return LETTERS[split_name(name)[2]]

    def write(self, name, array):
        """Add a step; of the neighbors in a batch, only the input of the mlp, where they share experts."""
        if not name.startswith(NEIGHBOR) or name.endswith("attn.residual"):
            self.steps.write(name, array)
            if name.endswith("mlp.residual"):
                self.progress()


def pass_names(name, count):
    """Return the pass names of all sequences of a batch of `count`, of which one is recorded as `name`."""
    names = [f"{NEIGHBOR}{number}.{name}" for number in range(count)]
    names[own_index(count)] = name
    return names


def own_index(count):
    """Return the index of the recorded sequence among `count` sequences."""
    return min(1, count - 1)


class FileRecording:
    """A recording in a file: a trace, or a dump of arrays under the names of steps or of an engine's modules.

    Attributes
    ----------
    path : str
    passes : list of PassRows
        The passes, from the metadata of a trace. Without metadata, and for batches, their positions are known
        only after `placing.placed`: until then, each begins at position 0.
    tp : int or None
        The number of ranks, if known.
    split : str or None
        The ranks' shares of the model, as in "3,1", if known.
    windows : list of (int or None)
        The sliding window of each layer; of an engine without metadata, None.
    layers : int
    has_all_ranks : bool
        True, because the arrays are not only a rank's part of them.
    others : list of str
        Names that are not steps, in the order of the file, such as weights; not the ranks' own arrays.

    Raises
    ------
    InputError
        If the file cannot be read.
    """

    has_all_ranks = True

    def __init__(self, path):
        self.path, self._file = path, open_dump(path)
        self.metadata = read_metadata(self._file)
        self._own, self._letters, self.others = {}, {}, []  # the first two by a step's full name
        entries = {
            name: entry.shape for name, entry in self._file.entries.items() if not re.match(r"rank\d+/", name)
        }
        for name, (step, letters) in steps_of(entries).items():
            self._own[step], self._letters[step] = name, letters
        self.others = [name for name in entries if name not in self._own.values()]
        if self.metadata is None:
            self.tp = self.split = None
            self.layers = 1 + max((_layer(name) for name in self._own), default=-1)
            self.windows, self.passes = [None] * self.layers, self._passes_of_shapes()
        else:
            self.tp, self.layers = self.metadata.tp, self.metadata.layers
            self.split = self._file.metadata.get("split")
            self.windows = list(self.metadata.config.windows)[: self.layers]
            found = {one.name: one.count for one in self._passes_of_shapes()}
            self.passes = [
                PassRows(name, start, stop, (stop - start) * found.get(name, 1), found.get(name, 1))
                for name, (start, stop) in self.metadata.passes.items()
            ]

    def __contains__(self, name):
        return name in self._own or name in self.others

    def read(self, name):
        return self._file.read_as_stored(self.own_name(name))

    def letters(self, name):
        """Return the letters of the axes of a step's array; 1 is the sequences of a batch."""
        return self._letters[name]

    def own_name(self, name):
        """Return the name in the file of a step."""
        return self._own.get(name, name)

    @property
    def dtype(self):
        """The dtype of the run, if the file is a trace."""
        return self._file.metadata.get("dtype")

    def keys_of(self, pass_name):
        """Return the largest number of keys that a pass has in the arrays; 0 if none has an axis of keys."""
        return max(
            (
                self._file.entries[own].shape[self._letters[name].index("S")]
                for name, own in self._own.items()
                if "S" in self._letters[name] and split_name(name)[0] == pass_name
            ),
            default=0,
        )

    def with_passes(self, passes):
        """Return this recording with other passes."""
        other = copy(self)
        other.passes = passes
        return other

    def _passes_of_shapes(self):
        """Return the passes in order, with the numbers of sequences and tokens that the arrays have."""
        shapes = {}  # pass -> (has an axis of sequences, number of sequences, number of tokens)
        for name, own in self._own.items():
            letters, sizes = self._letters[name], self._file.entries[own].shape
            if "T" in letters and split_name(name)[2] not in AFTER:
                count = sizes[letters.index(BATCH)] if BATCH in letters else 1
                found = BATCH in letters, count, sizes[letters.index("T")]
                pass_name = split_name(name)[0]
                shapes[pass_name] = max(found, shapes.get(pass_name, found))
        return [
            PassRows(name, 0, tokens, count * tokens, count)
            for name, (_, count, tokens) in sorted(shapes.items(), key=lambda item: pass_order(item[0]))
        ]


def _layer(name):
    layer = split_name(name)[1]
    return -1 if layer is None else layer


def common_positions(a, b):
    """Return the number of positions with the same tokens in two FileRecordings, and of those in both.

    Both are None if a recording has no metadata; `placing` then finds the tokens that are the same.

    Raises
    ------
    InputError
        If the two recordings are of different models, dtypes or prompts.
    """
    stop = min(max((one.stop for one in each.passes), default=0) for each in (a, b))
    if None not in (a.dtype, b.dtype) and a.dtype != b.dtype:
        raise InputError(
            f"{a.path} is in {a.dtype} and {b.path} in {b.dtype}: bits can be compared only in one dtype"
        )
    if None in (a.metadata, b.metadata):
        return None, None
    for name, ours, theirs in differing(a.metadata.config, b.metadata.config):
        if name not in MAY_DIFFER:
            raise InputError(
                f"{a.path} and {b.path} are recordings of different models: {name} is {shown(ours)} in the "
                f"first and {shown(theirs)} in the second"
            )
    if a.layers != b.layers:
        raise InputError(
            f"{a.path} has {counted(a.layers, 'layer')} and {b.path} has {b.layers}: record the same number"
        )
    pairs = zip(a.metadata.token_ids[:stop], b.metadata.token_ids[:stop], strict=False)
    same = next((position for position, (ours, theirs) in enumerate(pairs) if ours != theirs), stop)
    if stop and not same:
        raise InputError(
            f"{a.path} and {b.path} are recordings of different tokens: the first is "
            f"{a.metadata.token_ids[0]} in one and {b.metadata.token_ids[0]} in the other"
        )
    return same, stop
