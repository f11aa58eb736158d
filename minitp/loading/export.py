"""The ranks' shards as files for another engine: rank0.safetensors, rank1.safetensors, .. and plan.json.

A rank's file holds its slice of every tensor, under the checkpoint's names and in its dtypes. Tensors that
are not split are in every file. plan.json says how each tensor was cut, which is enough to reassemble the
checkpoint:

    format            minitp-shards-1
    model             the model's name, as the user gave it
    config            the object in config.json
    tp, split         the number of ranks, and their shares of the model, as in "3,1"
    layers            the number of layers (with --layers, fewer layers than in `config`)
    head_ranges, kv_head_ranges, ffn_ranges, vocab_ranges
                      (start, stop) of each rank; two ranks may hold the same KV head
    tensors           by name: dtype, shape, axis (null: whole on every rank) and each rank's (start, stop).
                      A joined tensor, such as Phi-3's q, k and v, is listed as its parts, each with
                      `part_of`, the joined tensor's name, and `first_row`, the part's first row in it

Random weights are written in float32, the dtype in which every run draws them.
"""

import json
import os
import shutil
from math import prod

from minitp.errors import InputError, RankError
from minitp.loading.safetensors_writer import TensorWriter
from minitp.loading.weights import BLOCK_BYTES, EMBED, LM_HEAD
from minitp.util.format import counted

FORMAT = "minitp-shards-1"
PLAN = "plan.json"
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def dtype_of(source, name):
    """Return a tensor's dtype in the checkpoint (safetensors' name); random weights are F32."""
    return "F32" if source.is_random else source.tensors.tensors[name].dtype


def nbytes(source, name, rank=None):
    """Return the bytes of a tensor in the checkpoint, or of one rank's slice of it."""
    shard = source.plan.tensors[name]
    shape = shard.shape if rank is None else shard.shape_on(rank)
    return prod(shape) * ITEM_BYTES[dtype_of(source, name)]


def rank_nbytes(source, rank):
    """Return the bytes of all slices that a rank holds."""
    return sum(nbytes(source, name, rank) for name in source.plan.tensors)


def prepare_directory(directory, source):
    """Create `directory` if needed, and reject it if the shards cannot be written there.

    Raises
    ------
    InputError
        if the directory cannot be created or written to, has too little free space, or holds the files of a
        plan for more ranks, which would look like files of this plan.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"-o {directory}: cannot create this directory: {error.strerror}; choose another"
        ) from error
    effective = os.access in os.supports_effective_ids
    if not os.access(directory, os.W_OK | os.X_OK, effective_ids=effective):
        raise InputError(f"-o {directory}: no permission to write there; choose another directory")
    stale = directory / f"rank{source.plan.tp}.safetensors"
    if stale.exists():
        raise InputError(
            f"{stale} belongs to a plan for more than {counted(source.plan.tp, 'rank')}; remove it, or "
            "choose another directory"
        )
    needed = sum(rank_nbytes(source, rank) for rank in range(source.plan.tp))
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise InputError(
            f"-o {directory}: the files need {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB is free; "
            "choose another directory"
        )


def refuse_untied_copy(source):
    """Reject a checkpoint with tied embeddings whose lm_head differs from them.

    The shards do not contain the lm_head, so another engine would use the embeddings instead.
    """
    tensors = source.plan.tensors
    if LM_HEAD in tensors or source.is_random or LM_HEAD not in source.tensors.tensors:
        return
    info, (rows, columns) = source.tensors.tensors[LM_HEAD], tensors[EMBED].shape
    size = max(1, BLOCK_BYTES // (4 * columns))  # rows per block
    blocks = [(slice(i, min(i + size, rows)), slice(0, columns)) for i in range(0, rows, size)]
    if info.shape != (rows, columns) or any(
        (source.tensors.read(LM_HEAD, block) != source.tensors.read(EMBED, block)).any() for block in blocks
    ):
        raise InputError(
            f"{info.file}: {LM_HEAD} differs from {EMBED}, but config.json says tie_word_embeddings: true"
        )


def write_shards(directory, source, progress=lambda nbytes: None):
    """Write every rank's file, then plan.json; memory holds one slice of one tensor at a time.

    Each file is written under a temporary name and renamed once it is complete. plan.json is written last: if
    it exists, all files do.

    Parameters
    ----------
    directory : Path
        A directory that `prepare_directory` has accepted.
    source : ModelSource
    progress : callable
        A function that is called after each tensor with the tensor's size in bytes.

    Raises
    ------
    RankError
        if the disk is full or fails.
    """
    plan = source.plan
    try:
        (directory / PLAN).unlink(missing_ok=True)  # the plan of an earlier run, whose files will be replaced
        for rank in range(plan.tp):
            metadata = {"format": FORMAT, "rank": str(rank), "tp": str(plan.tp)}
            with TensorWriter(directory / f"rank{rank}.safetensors", plan.tensors, metadata) as file:
                for name, shard in plan.tensors.items():
                    part = source.tensors.read(name, shard.index(rank))
                    file.write(name, part.reshape(shard.shape_on(rank)))  # an empty slice is read as [0, 0]
                    progress(part.nbytes)
        temporary = directory / f"{PLAN}.{os.getpid()}.part"
        try:
            temporary.write_text(plan_json(source), encoding="utf-8")
            temporary.replace(directory / PLAN)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise RankError(f"{directory}: cannot be written: {error.strerror}") from error


def plan_json(source):
    """Return the text of plan.json, with one line for each entry and each tensor."""
    plan = source.plan
    entries = {
        "format": FORMAT,
        "model": source.name,
        "config": source.fields(),
        "tp": plan.tp,
        "split": source.shares,
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
