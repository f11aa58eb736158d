"""The file of another engine under the names of `minitp trace`, by the table of `mapping`."""

import numpy as np

from minitp.compare.files import Entry, TensorFile
from minitp.errors import InputError
from minitp.mapping.lookup import TensorLookup, rows_on_rank
from minitp.mapping.steps import StepLookup
from minitp.mapping.table import EngineTensor
from minitp.trace.names import WEIGHTS, full_name

PASS = "prefill"  # the pass of names that have no pass
JOINED = {  # steps that engines compute with one matrix -> the matrices of a checkpoint
    ("attn.q", "attn.k", "attn.v"): [f"self_attn.{part}_proj.weight" for part in "qkv"],
    ("mlp.gate", "mlp.up"): ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
}


class MappedFile(TensorFile):
    """A TensorFile whose arrays have the names of steps and of `weights/..`; joined arrays are taken apart.

    Arrays that the table does not know keep their names.

    Parameters
    ----------
    file : TensorFile
    engine : str
        A key of `mapping.tensors.tensor_tables`.
    config : Config
    plan : Plan
        The engine's sharding plan.
    rank : int
        The rank that wrote the file.

    Raises
    ------
    InputError
        If a joined array has another size than its parts have on this rank.
    """

    def __init__(self, file, engine, config, plan, rank=0):
        self._file, self._plan, self._rank, self._head_dim = file, plan, rank, config.head_dim
        self._steps, self._tensors = StepLookup(engine, config), TensorLookup(engine, config)
        self._views = {}  # our name -> (the engine's name, the function that takes the array out)
        entries = {}
        for name, entry in file.entries.items():
            for ours, view, shape in self._arrays(name, entry.shape):
                self._views[ours] = name, view
                entries[ours] = Entry(shape, entry.dtype)
        super().__init__(file.path, entries, file.metadata)

    def read(self, name):
        """Return an array in float64, as TensorFile does."""
        theirs, view = self._views[name]
        return view(self._file.read(theirs))

    def name_in_file(self, name):
        """Return the engine's own name of an array."""
        return self._views[name][0]

    def _arrays(self, name, shape):
        """Yield (our name, view, shape) for each step or weight that an array of the engine has."""
        tensor = self._tensors.find(name.removeprefix(WEIGHTS))
        if tensor.parts[0].format(n=0) in self._plan.tensors:
            yield from self._weights(tensor, name, shape)
            return
        pass_name, _, rest = name.rpartition("/")
        found = self._steps.find(rest)
        if found is None:
            yield name, np.asarray, shape
            return
        layer, source = found
        steps = tuple(source.step.split())
        names = [full_name(pass_name or PASS, layer, step) for step in steps]
        if len(steps) == 1:
            yield names[0], np.asarray, shape
            return
        parts = [f"model.layers.{layer}.{part}" for part in JOINED[steps]]
        yield from self._split(name, shape, EngineTensor(tuple(parts), source.order), names, axis=-1)

    def _weights(self, tensor, name, shape):
        if "{n}" not in tensor.parts[0]:
            yield from self._split(name, shape, tensor, [WEIGHTS + part for part in tensor.parts], axis=0)
            return
        for n in range(shape[0]):
            parts = tuple(part.format(n=n) for part in tensor.parts)
            one = EngineTensor(parts, tensor.order, tensor.rope)
            for ours, view, inner in self._split(name, shape[1:], one, [WEIGHTS + p for p in parts], axis=0):
                yield ours, _of_expert(n, view), inner

    def _split(self, name, shape, tensor, names, axis):
        """Yield the parts of a joined array, whose rows (or columns, for axis -1) are those of `tensor`."""
        if len(names) == 1:
            yield names[0], np.asarray, shape
            return
        blocks, places, start = rows_on_rank(tensor, self._plan, self._rank, self._head_dim), {}, 0
        for part, first, stop in blocks:
            places.setdefault(part, []).append(np.arange(start, start + stop - first))
            start += stop - first
        if start != (shape or (0,))[axis]:
            raise InputError(
                f"{self._file.path}: {name} has shape {list(shape)}, expected {start} in axis {axis} for "
                f"{', '.join(tensor.parts)}"
            )
        for ours, part in zip(names, tensor.parts, strict=True):
            rows = np.concatenate(places[part])  # int [n]
            inner = list(shape)
            inner[axis] = len(rows)
            yield ours, _taken(rows, axis), tuple(inner)


def _taken(rows, axis):
    return lambda array: array.take(rows, axis=axis)


def _of_expert(n, view):
    return lambda array: view(array[n])
