"""The rows of a projection if those of several projections, joined in one matrix, are taken apart wrongly."""

import numpy as np


def joined_rows(wrong, part):
    """Yield (description, weight [out, in], bias [out] or None) of a matrix that is taken apart wrongly.

    `part` is q, k, v, gate or up. The weights are those of one rank, so there must be one.
    """
    if wrong.other_ranks:
        return
    names = ("gate", "up") if part in ("gate", "up") else ("q", "k", "v")
    block = {"gate": "mlp"}.get(names[0], "self_attn")
    weights, biases = (
        [wrong.w(f"{block}.{name}_proj.{kind}") for name in names] for kind in ("weight", "bias")
    )
    if any(weight is None for weight in weights):
        return
    sizes, own = [len(weight) for weight in weights], names.index(part)
    if names[0] == "gate":
        units, count = [1, 1], sizes[0]
        joined, grouped = "gate and up", "interleaved row by row"
    else:
        d, count = wrong.reference.head_dim, wrong.reference.kv_heads
        units, joined, grouped = [sizes[0] // count, d, d], "q, k and v", "grouped by KV head"
    orders = {
        f"{joined} are {grouped}, but read as if one followed the other": read_as_blocks,
        f"{joined} follow one another, but are read as if {grouped}": read_as_groups,
    }
    for text, read in orders.items():
        rows = read(units, count, sizes)[own]
        yield (
            text,
            *(None if parts[0] is None else np.concatenate(parts)[rows] for parts in (weights, biases)),
        )


def grouped_order(units, count, sizes):
    """Return the rows of the plain matrix in the order of the grouped one: int [rows].

    The grouped matrix has `count` groups with units[i] rows of each part, the plain one sizes[i] rows.
    """
    starts = np.cumsum([0, *sizes[:-1]])
    return np.concatenate(
        [
            start + unit * group + np.arange(unit)
            for group in range(count)
            for start, unit in zip(starts, units, strict=True)
        ]
    )


def read_as_blocks(units, count, sizes):
    """Return for each part the rows of the plain matrix that it gets if the grouped one is cut in blocks."""
    return np.split(grouped_order(units, count, sizes), np.cumsum(sizes)[:-1])


def read_as_groups(units, count, sizes):
    """Return for each part the rows of the plain matrix that it gets if that is taken for the grouped one.

    >>> [rows.tolist() for rows in read_as_groups([1, 1], 2, [2, 2])]
    [[0, 2], [1, 3]]
    """
    order = np.argsort(grouped_order(units, count, sizes))
    return np.split(order, np.cumsum(sizes)[:-1])
