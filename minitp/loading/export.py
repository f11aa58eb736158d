"""The ranks' shards as files, for another engine: rank0.safetensors, rank1.safetensors, .. and plan.json.

A rank's file holds its slice of every tensor under the checkpoint's own names and in its dtypes; the tensors
that no split concerns are in every file. plan.json says what was cut how, and is enough to put the checkpoint
together again:

    format            minitp-shards-1
    model             what the user called it
    config            the object in config.json
    tp, layers        ranks, and layers (fewer than in `config` if so asked for)
    head_ranges, kv_head_ranges, ffn_ranges, vocab_ranges
                      (start, stop) of each rank; two ranks may both hold a KV head
    tensors           by name: dtype, shape, axis (null: whole on every rank) and each rank's (start, stop);
                      of what the checkpoint has joined, as Phi-3's q, k and v, each part, with `part_of` and
                      `first_row`: where it was

Random models are written as they are drawn, in float32: then the values are those of any run of them.
"""

import json
import os
import shutil
from math import prod

from minitp.errors import InputError, RankError
from minitp.loading.safetensors_writer import TensorWriter
from minitp.loading.weights import BLOCK_BYTES, EMBED, LM_HEAD

FORMAT = "minitp-shards-1"
PLAN = "plan.json"
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def dtype_of(source, name):
    """A tensor's dtype in the checkpoint, by safetensors' name; random weights are drawn as F32."""
    return "F32" if source.is_random else source.tensors.tensors[name].dtype


def nbytes(source, name, rank=None):
    """Bytes of a tensor in the checkpoint, or of a rank's slice of it."""
    shard = source.plan.tensors[name]
    shape = shard.shape if rank is None else shard.shape_on(rank)
    return prod(shape) * ITEM_BYTES[dtype_of(source, name)]


def rank_nbytes(source, rank):
    """Bytes of all that a rank holds."""
    return sum(nbytes(source, name, rank) for name in source.plan.tensors)


def prepare_directory(directory, source):
    """Make `directory` if need be, and refuse it now if the files cannot be written in the end.

    Raises
    ------
    InputError
        if it cannot be made or written to, has too little room, or holds files of more ranks, which would
        be taken for a part of this plan.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"-o {directory}: no directory can be made there: {error.strerror}; give another"
        ) from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise InputError(f"-o {directory}: you may not write there; give another directory")
    stale = directory / f"rank{source.plan.tp}.safetensors"
    if stale.exists():
        raise InputError(
            f"{stale}: of a plan for more than {source.plan.tp} ranks; remove it, or give another directory"
        )
    needed = sum(rank_nbytes(source, rank) for rank in range(source.plan.tp))
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise InputError(
            f"-o {directory}: {needed / 1e9:.2f} GB are to be written, and {free / 1e9:.2f} GB are free there"
        )


def refuse_untied_copy(source):
    """A checkpoint of tied embeddings may hold lm_head all the same, but then with the same values.

    It is left out of the shards, and another engine would go by the embeddings.
    """
    tensors = source.plan.tensors
    if LM_HEAD in tensors or source.is_random or LM_HEAD not in source.tensors.tensors:
        return
    info, (rows, columns) = source.tensors.tensors[LM_HEAD], tensors[EMBED].shape
    step = max(1, BLOCK_BYTES // (4 * columns))
    blocks = [(slice(i, min(i + step, rows)), slice(0, columns)) for i in range(0, rows, step)]
    if info.shape != (rows, columns) or any(
        (source.tensors.read(LM_HEAD, block) != source.tensors.read(EMBED, block)).any() for block in blocks
    ):
        raise InputError(
            f"{info.file}: {LM_HEAD} differs from {EMBED}, but config.json says tie_word_embeddings: true"
        )


def write_shards(directory, source, progress=lambda nbytes: None):
    """Write every rank's file, then plan.json; memory holds one slice of one tensor at a time.

    Each file is written under another name and takes its own when it is whole, and plan.json comes last:
    where it is, everything is.

    Parameters
    ----------
    directory : Path
        From `prepare_directory`.
    source : ModelSource
    progress : callable
        Called with the number of bytes after each tensor.

    Raises
    ------
    RankError
        if the disk is full, or fails.
    """
    plan = source.plan
    try:
        (directory / PLAN).unlink(missing_ok=True)  # of an earlier run, whose files are replaced now
        for rank in range(plan.tp):
            facts = {"format": FORMAT, "rank": str(rank), "tp": str(plan.tp)}
            with TensorWriter(directory / f"rank{rank}.safetensors", plan.tensors, facts) as file:
                for name, shard in plan.tensors.items():
                    part = source.tensors.read(name, shard.index(rank))
                    file.write(name, part.reshape(shard.shape_on(rank)))  # an empty one may come without
                    progress(part.nbytes)
        beside = directory / f"{PLAN}.{os.getpid()}.part"
        try:
            beside.write_text(plan_json(source), encoding="utf-8")
            beside.replace(directory / PLAN)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise RankError(f"{directory}: cannot be written: {error.strerror}") from error


def plan_json(source):
    """The text of plan.json, a line for each entry and each tensor."""
    plan = source.plan
    entries = {
        "format": FORMAT,
        "model": source.name,
        "config": source.fields(),
        "tp": plan.tp,
        "layers": plan.layers,
        "head_ranges": plan.head_ranges,
        "kv_head_ranges": plan.kv_head_ranges,
        "ffn_ranges": plan.ffn_ranges,
        "vocab_ranges": plan.vocab_ranges,
    }
    tensors = {
        name: {
            "dtype": dtype_of(source, name),
            "shape": shard.shape,
            "axis": shard.axis,
            "ranges": shard.ranges,
            **({"part_of": shard.part_of, "first_row": shard.first_row} if shard.part_of else {}),
        }
        for name, shard in plan.tensors.items()
    }
    head = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in entries.items()]
    rows = [f"    {json.dumps(name)}: {json.dumps(value)}" for name, value in tensors.items()]
    return "\n".join(["{", *head, '  "tensors": {', ",\n".join(rows), "  }", "}"]) + "\n"
