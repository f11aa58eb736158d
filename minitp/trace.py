"""Recording the steps of a forward pass, and writing them to a file assembled over the ranks.

A trace is a safetensors file: tensors under the names of `steps`, with what is needed to read them in its
metadata (all values are strings; those that are not names are JSON):

    format      minitp-trace-1
    source      ranks, or oracle
    model       what the user called it
    config      the object in config.json
    tp, dtype   of the run
    layers      that were run
    token_ids   those that went in, prompt and decoded ones
    passes      [name, first position, stop position] of each
    kinds       how the ranks shared each step: {"layers.*.attn.q": {"kind": "sharded", "axis": 0, ..}}
"""

import dataclasses
import json
from contextlib import nullcontext
from fnmatch import fnmatchcase
from functools import partial

import numpy as np

from minitp.errors import InputError
from minitp.oracle import Oracle
from minitp.steps import AFTER, BEFORE, LARGE, LAYER, Kind, full_name, kinds, split_name, step_names
from minitp.trace_file import TensorWriter
from minitp.weights import named_slices

FORMAT = "minitp-trace-1"
WEIGHTS = "weights/"


class Recorder:
    """Takes a rank's steps from the model and hands on those that are wanted, as NumPy arrays.

    Parameters
    ----------
    device : Device
    wanted : container of str
        Full names.
    take : callable
        Gets a dict of full name to this rank's array: the steps of one call, in order.
    """

    def __init__(self, device, wanted, take):
        self.pass_name = None
        self._device, self._wanted, self._take = device, wanted, take

    def __call__(self, block=None, layer=None, /, **arrays):
        """Steps `layers.{layer}.{block}.NAME`, or just NAME."""
        found = {}
        for key, array in arrays.items():
            name = full_name(self.pass_name, layer, key if block is None else f"{block}.{key}")
            if name in self._wanted:
                found[name] = self._device.to_host(array)
        if found:
            self._take(found)


def passes_of(tokens, decode):
    """(name, start, stop) of the passes: `tokens` positions of prefill, then `decode` times one."""
    later = [(f"decode.{n}", tokens + n - 1, tokens + n) for n in range(1, decode + 1)]
    return [("prefill", 0, tokens), *later]


def wanted_steps(plan, passes, globs=None, oracle=False):
    """The full names that match one of `globs`, in order; None: all steps but the large ones and the weights.

    Of the `oracle` those that it has: no weights, and nothing of a single rank.

    Raises
    ------
    InputError
        if one of them matches nothing.
    """
    steps = [f"{name}/{step}" for name, _, _ in passes for step in step_names(plan)]
    if oracle:
        steps = [name for name in steps if not name.endswith("_partial")]
    if globs is None:
        return [name for name in steps if not name.endswith(LARGE)]
    names = [*([] if oracle else [WEIGHTS + name for name in plan.tensors]), *steps]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            who = "the oracle has no such step" if oracle else "no step of this run is called so"
            raise InputError(f"--steps {glob!r}: {who}; names are like {names[0]}, {steps[5]}, {steps[-1]}")
    return [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]


def run_passes(model, token_ids, passes, record):
    """Run the prompt, then the token that was most probable after each pass; return all that went in."""
    ids, cache = list(token_ids), model.new_cache(passes[-1][2])
    for name, start, _ in passes:
        record.pass_name = name
        logits = model.forward(ids[start:], cache, logits_at=slice(None), record=record)  # [T, V]
        last = model.device.to_host(logits[-1])  # [V]
        ids.append(model.comm.broadcast(int(last.argmax()) if model.comm.rank == 0 else None))
    return ids[:-1]


def assemble(kind, parts):
    """The whole array of a step, from each rank's part in rank order.

    A KV head that several ranks hold is the first one's; partial sums are added in float64.
    """
    if kind.kind == "replicated":
        return parts[0]
    if kind.kind == "partial":
        return sum(part.astype(np.float64) for part in parts).astype(parts[0].dtype)
    shape = list(parts[0].shape)
    shape[kind.axis] = kind.ranges[-1][1]
    whole = np.empty(shape, dtype=parts[0].dtype)  # as in the tables of `steps`
    for part, (start, stop) in reversed(list(zip(parts, kind.ranges, strict=True))):
        whole[(slice(None),) * kind.axis + (slice(start, stop),)] = part
    return whole


def write_trace(path, source, model, token_ids, passes, wanted, per_rank=False):
    """Run the prompt and write its steps to `path`; all ranks call it, rank 0 writes.

    Steps go to the file as they come, so memory holds those of one call of the recorder, of all ranks.

    Parameters
    ----------
    path : Path
    source : ModelSource
    model : Model
    token_ids : list of int
    passes : list of (name, start, stop)
        From `passes_of`.
    wanted : list of str
        From `wanted_steps`.
    per_rank : bool
        Write each rank's own pieces as well.
    """
    comm = model.comm
    kind_of = step_kinds(source)
    facts = partial(_metadata, source, tp=comm.size, dtype=model.device.dtype.name, passes=passes)
    file = None
    with comm.agreed():
        if comm.rank == 0:
            widest = [*token_ids, *[source.config.vocab_size - 1] * (len(passes) - 1)]
            prefixes = ["", *[f"rank{r}/" for r in range(comm.size)]] if per_rank else [""]
            names = [prefix + name for prefix in prefixes for name in wanted]
            file = TensorWriter(path, names, facts(widest))

    def take(found):
        everyones = comm.exchange(found)  # a dict a rank
        if comm.rank != 0:
            return
        for name in found:
            parts = [steps[name] for steps in everyones]
            file.write(name, assemble(kind_of(name), parts))
            if per_rank:
                for rank, part in enumerate(parts):
                    file.write(f"rank{rank}/{name}", part)

    with file or nullcontext():
        for name, array in named_slices(model.weights, source.plan, comm.rank):
            if WEIGHTS + name in wanted:
                take({WEIGHTS + name: model.device.to_host(array)})
        ids = run_passes(model, token_ids, passes, Recorder(model.device, set(wanted), take))
        if file is not None:
            file.metadata = facts(ids)


def write_oracle_trace(path, source, token_ids, passes, wanted):
    """The same from the oracle, in float64 and on one process. It has no partial sums and no weights."""
    oracle = open_oracle(source)
    ids = list(token_ids)
    while len(ids) < passes[-1][2]:
        ids.append(int(oracle.logits(ids)[-1].argmax()))
    metadata = _metadata(source, tp=1, dtype="float64", passes=passes, token_ids=ids)
    with TensorWriter(path, wanted, metadata) as file:
        for name, array in oracle_steps(oracle, ids, passes):
            if name in wanted:
                file.write(name, array)


def open_oracle(source):
    """The Oracle of a ModelSource, reading config.json and the weights for itself."""
    if source.directory is not None:
        return Oracle.from_directory(source.directory, source.plan.layers)
    if source.gguf is not None:
        from minitp.oracle_gguf import gguf_tensor

        return Oracle(source.fields(), gguf_tensor(source.gguf.file.path), source.plan.layers)

    def tensor(name, index=None):
        return source.tensors.read(name, index or tuple(slice(0, n) for n in source.tensors.shapes[name]))

    return Oracle(source.fields(), tensor, source.plan.layers)


def oracle_steps(oracle, token_ids, passes):
    """(full name, float64 array) of the oracle's steps for all passes, cut out of one run over all tokens.

    The steps of a layer come for all passes before those of the next layer.
    """
    letters = BEFORE | LAYER | AFTER
    for name, whole in oracle.steps(token_ids):
        _, layer, step = split_name(name)
        cached = {"attn.k_rope": "attn.k_cache", "attn.v": "attn.v_cache"}.get(step)
        for pass_name, start, stop in passes:
            window = None if layer is None else oracle.windows[layer]
            first = 0 if window is None else max(0, start - window + 1)
            cuts = {"T": slice(start, stop), "S": slice(first, stop)}
            for called in filter(None, (step, cached)):
                index = tuple(cuts.get(letter, slice(None)) for letter in letters[called].split())
                yield full_name(pass_name, layer, called), whole[index]


def step_kinds(source):
    """A function: full name -> Kind."""
    by_step = kinds(source.plan, source.config.head_dim)

    def kind_of(name):
        if name.startswith(WEIGHTS):
            shard = source.plan.tensors[name.removeprefix(WEIGHTS)]
            return Kind("replicated") if shard.axis is None else Kind("sharded", shard.axis, shard.ranges)
        return by_step[split_name(name)[2]]

    return kind_of


def _metadata(source, token_ids, tp, dtype, passes):
    by_step = kinds(source.plan, source.config.head_dim)
    return {
        "format": FORMAT,
        "source": "oracle" if dtype == "float64" else "ranks",
        "model": source.name,
        "config": json.dumps(source.fields()),
        "tp": str(tp),
        "dtype": dtype,
        "layers": str(source.plan.layers),
        "token_ids": json.dumps(token_ids),
        "passes": json.dumps(passes),
        "kinds": json.dumps(
            {f"layers.*.{s}" if s in LAYER else s: dataclasses.asdict(kind) for s, kind in by_step.items()}
        ),
    }
