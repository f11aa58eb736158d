"""`minitp shard`."""

import re
import sys
import textwrap
from pathlib import Path

from tqdm import tqdm

from minitp.loading.export import (
    dtype_of,
    nbytes,
    prepare_directory,
    rank_nbytes,
    refuse_untied_copy,
    write_shards,
)
from minitp.loading.source import open_model
from minitp.loading.weights import LM_HEAD
from minitp.tensors import tensor_table
from minitp.util.format import aligned, counted, size
from minitp.util.stdout import write_out

WIDTH = 80  # of notes; the tables are as wide as they must be
LAYER = re.compile(r"model\.layers\.(\d+)\.")


def run(args, tp):
    """Print the plan; write the ranks' files."""
    source = open_model(args.model, tp, args.layers)
    directory = None if args.output is None else Path(args.output)
    if directory is not None:
        refuse_untied_copy(source)
        prepare_directory(directory, source)
    parts = [title(source), tensor_lines(source), legend(source), rank_lines(source), notes(source)]
    write_out("\n\n".join("\n".join(lines) for lines in parts if lines) + "\n")
    if directory is None:
        return 0
    total = sum(rank_nbytes(source, rank) for rank in range(tp))
    hidden = not sys.stderr.isatty()
    with tqdm(total=total, desc="writing", unit="B", unit_scale=True, leave=False, disable=hidden) as bar:
        write_shards(directory, source, bar.update)
    last = f" .. rank{tp - 1}.safetensors" if tp > 1 else ""
    write_out(f"\n{directory}: wrote rank0.safetensors{last} and plan.json, {size(total)}\n")
    return 0


def title(source):
    """What is divided, over how many."""
    c, tp = source.config, source.plan.tp
    sizes = (
        f"{counted(c.num_hidden_layers, 'layer')}, hidden size {c.hidden_size}, "
        f"{c.num_attention_heads} query heads and "
        f"{c.num_key_value_heads} KV heads of {c.head_dim} dimensions, {c.intermediate_size} FFN columns, "
        f"vocabulary of {c.vocab_size}"
    )
    return [f"{source.name} over {counted(tp, 'rank')}", *wrapped(sizes)]


def tensor_lines(source):
    """The table of the tensors. Layers whose tensors are all alike are one group of lines."""
    rows = [("tensor", "shape", "axis", "split", "dtype", "bytes")]
    rows += [tensor_row(source, name) for name in source.plan.tensors if not LAYER.match(name)]
    for layers in alike_layers(source):
        whole = len(layers) == source.plan.layers
        numbers = "*" if whole else ",".join(map(str, layers)) if len(layers) < 8 else f"{layers[0]}.."
        rows.append((f"model.layers.{numbers}.", f"x {len(layers)}", "", "", "", ""))
        rows += [tensor_row(source, name, layers) for name in layer_names(source, layers[0])]
    total = sum(nbytes(source, name) for name in source.plan.tensors)
    rows.append(("in all", "", "", "", "", size(total)))
    if source.config.tie_word_embeddings:
        rows.insert(2, (f"{LM_HEAD}: tied to the above", "", "", "", "", ""))
    return aligned(rows, "<<><<>")


def tensor_row(source, name, layers=None):
    """A tensor's line; with `layers`, in whose group it is, the bytes of all these."""
    held = source.plan.tensors[name]
    letter = "" if held.axis is None else tensor_table(source.config)[name].shape[held.axis]
    axis = "-" if held.axis is None else str(held.axis)
    called = name if layers is None else "  " + LAYER.sub("", name)
    count = 1 if layers is None else len(layers)
    return (
        called,
        str(list(held.shape)),
        axis,
        letter,
        dtype_of(source, name),
        size(count * nbytes(source, name)),
    )


def layer_names(source, layer):
    """The checkpoint's names for a layer's tensors."""
    return [name for name in source.plan.tensors if name.startswith(f"model.layers.{layer}.")]


def alike_layers(source):
    """Layer numbers in groups, by the tensors that they have: names, shapes, splits and dtypes."""
    groups = {}
    for layer in range(source.plan.layers):
        key = tuple(tensor_row(source, name, [layer]) for name in layer_names(source, layer))
        groups.setdefault(key, []).append(layer)
    return list(groups.values())


def legend(source):
    """What the columns of the ranks' table are."""
    d = source.config.head_dim
    return wrapped(
        "Each rank's start:stop (stop not included) along the split axis. "
        f"Hd: query heads x {d}, Kd: KV heads x {d}, F: FFN columns, V: vocabulary. "
        "A tensor without an axis is whole on every rank."
    )


def rank_lines(source):
    """The table of the ranks' ranges."""
    plan, d = source.plan, source.config.head_dim
    shared = shared_kv_heads(plan)
    rows = [("rank", "heads", "Hd", "KV heads", "Kd", "F", "V", "bytes")]
    for rank in range(plan.tp):
        heads, kv_heads = plan.head_ranges[rank], plan.kv_head_ranges[rank]
        mark = "*" if any(head in shared for head in range(*kv_heads)) else ""
        rows.append(
            (
                str(rank),
                range_text(heads),
                range_text(n * d for n in heads),
                range_text(kv_heads) + mark,
                range_text(n * d for n in kv_heads),
                range_text(plan.ffn_ranges[rank]),
                range_text(plan.vocab_ranges[rank]),
                size(rank_nbytes(source, rank)),
            )
        )
    total = sum(rank_nbytes(source, rank) for rank in range(plan.tp))
    rows.append(("all", "", "", "", "", "", "", size(total)))
    return aligned(rows, "><<<<<<>")


def notes(source):
    """What is held more than once, and what the bytes of random weights are."""
    plan, found = source.plan, []
    shared = shared_kv_heads(plan)
    if shared:
        where = ", ".join(f"head {head} is on {spoken(ranks)}" for head, ranks in shared.items())
        found.append(f"* with KV heads that other ranks hold too, as query heads there read them: {where}.")
    sizes = {name: nbytes(source, name) for name in plan.tensors}
    more = sum(rank_nbytes(source, rank) for rank in range(plan.tp)) - sum(sizes.values())
    copies = (plan.tp - 1) * sum(sizes[name] for name, held in plan.tensors.items() if held.axis is None)
    if more:
        heads = f"{size(more - copies)} for KV heads, " if shared else ""
        found.append(
            f"The ranks hold {size(more)} ({more / sum(sizes.values()):.2%}) more than the checkpoint: "
            f"{heads}{size(copies)} for tensors that are whole on every rank."
        )
    if source.is_random:
        found.append("Random weights are drawn, and written, as float32; in 16 bits they are half as large.")
    if source.gguf is not None:
        found.append("What is quantized in the GGUF file is counted, and written, as float32.")
    return [line for note in found for line in wrapped(note)]


def shared_kv_heads(plan):
    """The KV heads that more than one rank holds: head -> its ranks."""
    holders = {}
    for rank, (start, stop) in enumerate(plan.kv_head_ranges):
        for head in range(start, stop):
            holders.setdefault(head, []).append(rank)
    return {head: ranks for head, ranks in holders.items() if len(ranks) > 1}


def spoken(ranks):
    """Consecutive ranks as text.

    >>> spoken([1, 2]), spoken([4, 5, 6, 7])
    ('ranks 1 and 2', 'ranks 4 to 7')
    """
    return f"ranks {ranks[0]} {'and' if len(ranks) == 2 else 'to'} {ranks[-1]}"


def range_text(ends):
    """A (start, stop) as text.

    >>> range_text((0, 3))
    '0:3'
    """
    return ":".join(map(str, ends))


def wrapped(note):
    """A note as lines."""
    return textwrap.wrap(note, WIDTH, break_long_words=False, break_on_hyphens=False)
