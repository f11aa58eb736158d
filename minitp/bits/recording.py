"""The recordings whose bits are compared: the steps of one sequence, in passes over its positions."""

import re
from dataclasses import dataclass

from minitp.bits.names import LETTERS, steps_of
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
        The number of tokens of all sequences in the pass.
    """

    name: str
    start: int
    stop: int
    rows: int


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
    """

    steps: object
    passes: list
    tp: int
    windows: list
    others = ()

    @property
    def layers(self):
        return len(self.windows)

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
        The passes, from the metadata of a trace or from the shapes of the arrays.
    tp : int or None
        The number of ranks, if known.
    windows : list of (int or None)
        The sliding window of each layer; of an engine without metadata, None.
    layers : int
    others : list of str
        Names that are not steps, in the order of the file, such as weights; not the ranks' own arrays.

    Raises
    ------
    InputError
        If the file cannot be read.
    """

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
            self.tp, self.layers = None, 1 + max((_layer(name) for name in self._own), default=-1)
            self.windows, self.passes = [None] * self.layers, self._passes_of_shapes()
        else:
            self.tp, self.layers = self.metadata.tp, self.metadata.layers
            self.windows = list(self.metadata.config.windows)[: self.layers]
            ranges = self.metadata.passes.items()
            self.passes = [PassRows(name, start, stop, stop - start) for name, (start, stop) in ranges]

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

    def _passes_of_shapes(self):
        """Return passes that follow each other, with the number of tokens that the arrays have."""
        tokens = {}
        for name, own in self._own.items():
            letters = self._letters[name]
            if "T" in letters and split_name(name)[2] not in AFTER:
                tokens[split_name(name)[0]] = self._file.entries[own].shape[letters.index("T")]
        passes, start = [], 0
        for name in sorted(tokens, key=pass_order):
            passes.append(PassRows(name, start, start + tokens[name], tokens[name]))
            start += tokens[name]
        return passes


def _layer(name):
    layer = split_name(name)[1]
    return -1 if layer is None else layer


def common_positions(a, b):
    """Return the number of positions with the same tokens in two FileRecordings, and of those in both.

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
        return stop, stop
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
