"""The file of a trace: the steps of a run, assembled over the ranks.

A trace is a safetensors file that contains each step under its full name (see `names`). Its metadata
describes the run. All values are strings; config, tp, layers, token_ids, passes and kinds are JSON:

    format      minitp-trace-1
    source      ranks or oracle
    model       the model as the user named it
    config      the object in config.json
    tp, dtype   number of ranks and dtype of the run
    split       the ranks' shares of the model, as in "3,1"
    layers      number of layers that were run
    token_ids   token ids that were run: the prompt, then the decoded tokens
    passes      [name, first position, stop position] of each pass
    kinds       distribution of each step over the ranks:
                {"layers.*.attn.q": {"kind": "sharded", "axis": 0, ..}}
"""

import dataclasses
import json
from contextlib import nullcontext
from functools import partial

from minitp.loading.safetensors_writer import TensorWriter
from minitp.loading.weights import named_slices
from minitp.trace.assemble import assemble, step_kinds
from minitp.trace.names import LAYER, WEIGHTS, kinds
from minitp.trace.record import Recorder, run_passes
from minitp.trace.reference import open_oracle, oracle_steps

FORMAT = "minitp-trace-1"
UNNAMED = "model"  # the name in the metadata if the model's config has none


def write_trace(path, source, model, token_ids, passes, wanted, per_rank=False):
    """Run the prompt and write its steps to `path`; all ranks call this, and rank 0 writes.

    Each step is written immediately, so rank 0 holds one step of all ranks in memory at a time.

    Parameters
    ----------
    path : Path
    source : ModelSource
    model : Model
    token_ids : list of int
    passes : list of (name, start, stop)
        Passes from `passes_of`.
    wanted : list of str
        Full names from `wanted_steps`.
    per_rank : bool
        Write each rank's own arrays as well.
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

    def take(name, array):
        parts = comm.allgather_object(array)
        if comm.rank != 0:
            return
        file.write(name, assemble(kind_of(name), parts))
        if per_rank:
            for rank, part in enumerate(parts):
                file.write(f"rank{rank}/{name}", part)

    with file or nullcontext():
        for name, array in named_slices(model.weights, source.plan, comm.rank):
            if WEIGHTS + name in wanted:
                take(WEIGHTS + name, model.device.to_host(array))
        ids = run_passes(model, token_ids, passes, Recorder(model.device, set(wanted), take))
        if file is not None:
            file.metadata = facts(ids)


def write_oracle_trace(path, source, token_ids, passes, wanted):
    """Write the oracle's steps, computed in float64 in this process, without weights and partial steps."""
    oracle = open_oracle(source)
    ids = list(token_ids)
    while len(ids) < passes[-1][2]:
        ids.append(int(oracle.logits(ids)[-1].argmax()))
    metadata = _metadata(source, tp=1, dtype="float64", passes=passes, token_ids=ids)
    with TensorWriter(path, wanted, metadata) as file:
        for name, array in oracle_steps(oracle, ids, passes):
            if name in wanted:
                file.write(name, array)


def _metadata(source, token_ids, tp, dtype, passes):
    by_step = kinds(source.plan, source.config.head_dim)
    return {
        "format": FORMAT,
        "source": "oracle" if dtype == "float64" else "ranks",
        "model": source.name,
        "config": json.dumps(source.fields()),
        "tp": str(tp),
        "split": source.shares if tp > 1 else "1",
        "dtype": dtype,
        "layers": str(source.plan.layers),
        "token_ids": json.dumps(token_ids),
        "passes": json.dumps(passes),
        "kinds": json.dumps(
            {f"layers.*.{s}" if s in LAYER else s: dataclasses.asdict(kind) for s, kind in by_step.items()}
        ),
    }
