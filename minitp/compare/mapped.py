"""The file of another engine under the names of `minitp trace`, by the table of `mapping`."""

from dataclasses import replace

import numpy as np

from minitp.compare.files import Entry, TensorFile
from minitp.mapping.lookup import TensorLookup, rows_on_rank
from minitp.mapping.steps import StepLookup
from minitp.mapping.table import EngineTensor
from minitp.shard import make_plan
from minitp.trace.names import WEIGHTS, full_name
from minitp.util.format import counted

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
    """

    def __init__(self, file, engine, config, plan, rank=0):
        self._file, self._engine, self._config = file, engine, config
        self._plan, self._rank, self._whole_plan = plan, rank, make_plan(config, 1)
        self._steps, self._tensors = StepLookup(engine, config), TensorLookup(engine, config)
        self._views = {}  # our name -> (the engine's name, the function that takes the array out)
        entries, unfit = {}, {}
        for name, entry in file.entries.items():
            found = self._arrays(name, entry.shape)
            if isinstance(found, str):
                unfit[name] = entry.shape, found
                continue
            for ours, view, shape in found:
                self._views[ours] = name, view
                entries[ours] = Entry(shape, entry.dtype)
        super().__init__(file.path, entries, file.metadata, file.unfit | unfit)

    def read(self, name):
        """Return an array in float64, as TensorFile does."""
        theirs, view = self._views[name]
        return view(self._file.read(theirs))

    def name_in_file(self, name):
        """Return the engine's own name of an array."""
        return self._views[name][0]

    def _arrays(self, name, shape):
        """Return a list of (our name, view, shape), one for each step or weight in an array of the engine.

        If it has another size than it should, return a text that says so.
        """
        tensor = self._tensors.find(name.removeprefix(WEIGHTS))
        if all(part.format(n=0) in self._plan.tensors for part in tensor.parts):
            return self._weights(tensor, shape)
        pass_name, _, rest = name.rpartition("/")
        found = self._steps.find(rest)
        if found is None:
            return [(name, np.asarray, shape)]
        layer, source = found
        steps = tuple(source.step.split())
        names = [full_name(pass_name or PASS, layer, step) for step in steps]
        if len(steps) == 1:
            return [(names[0], np.asarray, shape)]
        parts = tuple(f"model.layers.{layer}.{part}" for part in JOINED[steps])
        if not all(part in self._plan.tensors for part in parts):
            return [(name, np.asarray, shape)]
        return self._split(shape, EngineTensor(parts, source.order), names, axis=-1)

    def _weights(self, tensor, shape):
        if "{n}" in tensor.parts[0]:
            return self._experts(tensor, shape)
        if self._engine == "hf" and len(tensor.parts) > 1 and self._plan.tp > 1:
            return "transformers cuts a joined matrix as a whole; minitp lint --engine hf checks such shards"
        names = [WEIGHTS + part for part in tensor.parts]
        return self._split(shape, tensor, names, axis=0)

    def _experts(self, tensor, shape):
        """Return the arrays of `_arrays` for experts that are stacked along the first axis."""
        experts, found = self._config.num_local_experts, []
        if len(shape) != 3 or shape[0] != experts:
            return f"expected {counted(experts, 'expert')}; minitp lint checks experts that are on some ranks"
        for n in range(experts):
            parts = tuple(part.format(n=n) for part in tensor.parts)
            one = replace(tensor, parts=parts)
            arrays = self._split(shape[1:], one, [WEIGHTS + part for part in parts], axis=0)
            if isinstance(arrays, str):
                return arrays
            found += [(ours, _of_expert(n, view), inner) for ours, view, inner in arrays]
        return found

    def _split(self, shape, tensor, names, axis):
        """Return the parts of a joined array, whose rows (or columns, for axis -1) are those of `tensor`.

        A rank has its own rows of each part, or all of them if the engine gathers them.
        """
        if len(names) == 1:
            offset = tensor.offset
            return [(names[0], (lambda array: array - offset) if offset else np.asarray, shape)]
        size, expected = shape[axis] if shape else 1, []
        for plan, rank in ((self._plan, self._rank), (self._whole_plan, 0)):
            blocks = rows_on_rank(tensor, plan, rank, self._config.head_dim)
            expected.append(sum(stop - first for _, first, stop in blocks))
            if expected[-1] == size:
                return _parts(shape, blocks, tensor.parts, names, axis)
        return f"expected {expected[0]} along axis {axis}, for {' and '.join(names)}"


def _parts(shape, blocks, parts, names, axis):
    """Return (our name, view, shape) of each part, given the (part, first row, stop) of all blocks."""
    places, start = {}, 0
    for part, first, stop in blocks:
        places.setdefault(part, []).append(np.arange(start, start + stop - first))
        start += stop - first
    found = []
    for ours, part in zip(names, parts, strict=True):
        rows = np.concatenate(places[part])  # int [n]
        inner = list(shape)
        inner[axis] = len(rows)
        found.append((ours, _taken(rows, axis), tuple(inner)))
    return found


def _taken(rows, axis):
    return lambda array: array.take(rows, axis=axis)


def _of_expert(n, view):
    return lambda array: view(array[n])
