"""The sharding plan as text, for `minitp shard`."""

import re
import textwrap

from minitp.loading.export import dtype_of, nbytes, rank_nbytes
from minitp.loading.weights import LM_HEAD
from minitp.tensors import tensor_table
from minitp.util.format import aligned, counted, size

WIDTH = 80  # columns of notes; tables are as wide as necessary
LAYER = re.compile(r"model\.layers\.(\d+)\.")


def text(source):
    """Format the plan of a ModelSource."""
    parts = [title(source), tensor_lines(source), legend(source), rank_lines(source), notes(source)]
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def title(source):
    """Return the heading: the model, the number of ranks, and the model's sizes."""
    c, tp = source.config, source.plan.tp
    sizes = (
        f"{counted(c.num_hidden_layers, 'layer')}, hidden size {c.hidden_size}, "
        f"{counted(c.num_attention_heads, 'query head')} and "
        f"{counted(c.num_key_value_heads, 'KV head')} of {counted(c.head_dim, 'dimension')}, "
        f"{counted(c.intermediate_size, 'FFN column')}, "
        f"vocabulary of {c.vocab_size}"
    )
    return [f"{source.name} over {counted(tp, 'rank')}", *wrapped(sizes)]


def tensor_lines(source):
    """Return the table of tensors. Layers with the same tensors share one group of lines."""
    rows = [("tensor", "shape", "axis", "split", "dtype", "bytes")]
    rows += [tensor_row(source, name) for name in source.plan.tensors if not LAYER.match(name)]
    for layers in alike_layers(source):
        whole = len(layers) == source.plan.layers
        numbers = "*" if whole else ",".join(map(str, layers)) if len(layers) < 8 else f"{layers[0]}.."
        rows.append((f"model.layers.{numbers}.", f"x {len(layers)}", "", "", "", ""))
        rows += [tensor_row(source, name, layers) for name in layer_names(source, layers[0])]
    total = sum(nbytes(source, name) for name in source.plan.tensors)
    rows.append(("total", "", "", "", "", size(total)))
    if source.config.tie_word_embeddings:
        rows.insert(2, (f"{LM_HEAD}: tied embedding", "", "", "", "", ""))
    return aligned(rows, "<<><<>")


def tensor_row(source, name, layers=None):
    """Return the row of a tensor; in a group of `layers` it has the bytes of all of them."""
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
    """Return the names of a layer's tensors in the checkpoint."""
    return [name for name in source.plan.tensors if name.startswith(f"model.layers.{layer}.")]


def alike_layers(source):
    """Return the layers in groups whose tensors have the same names, shapes, splits and dtypes."""
    groups = {}
    for layer in range(source.plan.layers):
        key = tuple(tensor_row(source, name, [layer]) for name in layer_names(source, layer))
        groups.setdefault(key, []).append(layer)
    return list(groups.values())


def legend(source):
    """Return the explanation of the columns of the ranks' table."""
    d = source.config.head_dim
    return wrapped(
        "The ranges are start:stop along the split axis, stop not included. "
        f"Hd: query heads x {d}, Kd: KV heads x {d}, F: FFN columns, V: vocabulary. "
        "A tensor without an axis is whole on every rank."
    )


def rank_lines(source):
    """Return the table of the ranks' ranges."""
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
    """Return notes on tensors that several ranks hold, and on how bytes are counted."""
    plan, found = source.plan, []
    shared = shared_kv_heads(plan)
    if shared:
        where = ", ".join(f"head {head} is on {spoken(ranks)}" for head, ranks in shared.items())
        found.append(
            f"* includes KV heads that several ranks hold, because their query heads read them: {where}."
        )
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
        found.append(
            "Random weights are generated and written as float32; in 16 bits they are half as large."
        )
    if source.gguf is not None:
        found.append("Tensors that are quantized in the GGUF file are counted and written as float32.")
    return [line for note in found for line in wrapped(note)]


def shared_kv_heads(plan):
    """Return the KV heads that more than one rank holds: head -> its ranks."""
    holders = {}
    for rank, (start, stop) in enumerate(plan.kv_head_ranges):
        for head in range(start, stop):
            holders.setdefault(head, []).append(rank)
    return {head: ranks for head, ranks in holders.items() if len(ranks) > 1}


def spoken(ranks):
    """Format consecutive ranks.

    >>> spoken([1, 2]), spoken([4, 5, 6, 7])
    ('ranks 1 and 2', 'ranks 4 to 7')
    """
    return f"ranks {ranks[0]} {'and' if len(ranks) == 2 else 'to'} {ranks[-1]}"


def range_text(ends):
    """Format a (start, stop).

    >>> range_text((0, 3))
    '0:3'
    """
    return ":".join(map(str, ends))


def wrapped(note):
    """Return a note, wrapped into lines."""
    return textwrap.wrap(note, WIDTH, break_long_words=False, break_on_hyphens=False)
