"""The tensors of an engine over all ranks: their names, what they should hold, and what they do hold."""

from dataclasses import dataclass, field, replace

import numpy as np

from minitp.errors import InputError
from minitp.lint.experts import EXPERT, NUMBER, ExpertNumbers
from minitp.lint.names import is_ignored, other_model
from minitp.mapping.table import EngineTensor
from minitp.util.format import counted

FLOATS = ("float64", "float32", "float16", "bfloat16")
SHOWN = 3  # names that a note lists


@dataclass
class HeldPieces:
    """The pieces that one rank holds of a tensor.

    Attributes
    ----------
    codes : array
        The code of each piece, [n]; see `pieces`.
    axis : int
        The axis of the shard along which its pieces lie.
    source_axis : int
        The axis of the checkpoint's tensor along which they lie there.
    values : str
        The difference between the values of some pieces and those of the checkpoint; "" if they are equal.
        The codes of these pieces are the expected ones.
    changed : array or None
        The pieces that `values` is about, [n] bool.
    """

    codes: np.ndarray
    axis: int
    source_axis: int
    values: str = ""
    changed: np.ndarray | None = None


@dataclass
class ShardedTensor:
    """One tensor of an engine, on all ranks.

    Attributes
    ----------
    name : str
        The engine's name; a matrix of stacked experts has the number of its expert in brackets.
    layout : EngineTensor
        The checkpoint's tensors that it joins.
    by_name : bool
        True if the layout follows from the name; otherwise the tensor was found by content.
    entries : list of (str, int or None) or None
        For each rank: the name in its files, and the index of an expert in a stack. None if it is not there.
    shapes : list of tuple or None
        The shape on each rank.
    expected : list of array or None
        The expected codes of each rank.
    held : list of HeldPieces or None
        The pieces of each rank.
    """

    name: str
    layout: EngineTensor
    by_name: bool
    entries: list
    shapes: list
    expected: list = field(default_factory=list)
    held: list = field(default_factory=list)

    @property
    def holders(self):
        """The ranks that have the tensor."""
        return [rank for rank, entry in enumerate(self.entries) if entry is not None]

    @property
    def is_expected(self):
        """True if each rank holds exactly the expected pieces."""
        return all(
            self.expected[rank] is not None
            and self.held[rank].axis == self.held[rank].source_axis
            and not self.held[rank].values
            and np.array_equal(self.held[rank].codes, self.expected[rank])
            for rank in self.holders
        )


def matrix_shape(shape):
    """Return the shape of a matrix, or that of a vector as a matrix of one column."""
    return shape if len(shape) == 2 else (*shape, 1)


@dataclass
class TensorsOfRanks:
    """All tensors of an engine, without what they hold.

    Attributes
    ----------
    tensors : list of ShardedTensor
        The layout of a tensor whose name explains nothing has no parts yet.
    faults : dict of str to str
        What is wrong with the name or the shape of a tensor.
    notes : dict of str to str
        The entries that are not compared.
    experts : ExpertNumbers
    """

    tensors: list
    faults: dict
    notes: dict
    experts: ExpertNumbers


def collect(ranks, known, pieces, experts):
    """Return the TensorsOfRanks.

    Parameters
    ----------
    ranks : list of FilesOfRank
    known : KnownNames
    pieces : CheckpointPieces
    experts : int
        The number of experts in a layer.
    """
    layouts, faults, notes = compared_names(ranks, known)
    numbers = ExpertNumbers(ranks, layouts, pieces, experts)
    tensors = {}
    for name, layout in layouts.items():
        for rank, files in enumerate(ranks):
            if name not in files.entries:
                continue
            shape = _checked_shape(files, name, layout, experts)
            for index in range(shape[0]) if is_stacked(layout) else [None]:
                called, one = _of_expert(name, layout, index, numbers, rank)
                empty = [None] * len(ranks)
                new = ShardedTensor(called, one or EngineTensor(()), one is not None, empty, list(empty))
                tensor = tensors.setdefault(called, new)
                tensor.entries[rank] = name, index
                own = shape[1:] if is_stacked(layout) else shape
                tensor.shapes[rank] = matrix_shape(own)
                if one and pieces.is_vector(one.parts[0]) != (len(own) == 1):
                    expected = "a vector" if len(own) == 2 else "a matrix"
                    faults.setdefault(called, f"rank {rank} has shape {list(own)}, expected {expected}")
    return TensorsOfRanks(list(tensors.values()), faults, notes, numbers)


def compared_names(ranks, known):
    """Return the layout of each name that is compared, or None for an unknown one; then faults and notes."""
    layouts, faults, others, no_weights = {}, {}, {}, []
    for name in dict.fromkeys(name for rank in ranks for name in rank.entries):
        if is_ignored(name):
            continue
        layout = known.layout(name)
        if layout is not None:
            layouts[name] = layout
        elif excess := known.excess(name):
            faults[name] = excess
        elif module := other_model(name):
            others.setdefault(module, []).append(name)
        elif not all(is_weight(rank.entries[name]) for rank in ranks if name in rank.entries):
            no_weights.append(name)
        else:
            layouts[name] = None
    notes = {
        f"{module}.*": f"{counted(len(names), 'tensor')} of another model, not compared"
        for module, names in others.items()
    }
    if no_weights:
        listed = ", ".join(sorted(no_weights)[:SHOWN]) + (", .." if len(no_weights) > SHOWN else "")
        notes["not compared"] = f"{counted(len(no_weights), 'tensor')} that cannot be weights: {listed}"
    return layouts, faults, notes


def is_weight(entry):
    """Return whether an entry of an unknown name can be a weight: a matrix or a vector of several floats."""
    return entry.dtype in FLOATS and len(entry.shape) in (1, 2) and entry.shape != (1,)


def is_stacked(layout):
    """Return whether a tensor has the matrices of several experts, along a first axis."""
    return layout is not None and "{n}" in layout.parts[0]


def _of_expert(name, layout, index, numbers, rank):
    """Return the name and the layout of a tensor, with the checkpoint's number of its expert."""
    found = layout and EXPERT.match(layout.parts[0])
    if not found:
        return name, layout
    own = int(found[2]) if index is None else index
    number = numbers.number(rank, layout.parts[0], own)
    parts = tuple(NUMBER.sub(f".experts.{number}.", part) for part in layout.parts)
    called = name if index is None else f"{name}[{number}]"
    if index is None and number != own:
        called = f"{name} (expert {number})"
    return called, replace(layout, parts=parts)


def _checked_shape(files, name, layout, experts):
    """Return the shape of a tensor, or raise an InputError if it is none of weights."""
    entry = files.entries[name]
    if entry.dtype not in FLOATS:
        raise InputError(
            f"{files.path}: {name} has dtype {entry.dtype}; lint compares bits, so it needs shards in "
            f"{', '.join(FLOATS)}, before they are quantized"
        )
    allowed = (3,) if is_stacked(layout) else (1, 2)
    if len(entry.shape) not in allowed:
        axes = "[experts, out, in]" if is_stacked(layout) else "[out, in] or [out]"
        raise InputError(f"{files.path}: {name} has shape {list(entry.shape)}, expected {axes}")
    if is_stacked(layout) and entry.shape[0] > experts:
        raise InputError(
            f"{files.path}: {name} has {counted(entry.shape[0], 'expert')}, but a layer of the model has "
            f"{experts}; remove copies and padding"
        )
    return entry.shape
