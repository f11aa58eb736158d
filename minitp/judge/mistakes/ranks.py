"""The common mistakes of tensor parallelism: sums over the ranks, and parts of a weight on the wrong rank.

Each function yields (description, array) for the mistakes in some steps, computed in float64 from the inputs
that the ranks really had. With one rank, they yield only mistakes with a bias.
"""

import numpy as np

JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


def sum_mistakes(wrong):
    """Try mistakes in the sum over the ranks."""
    parts = wrong.of_ranks("out_partial")  # [T, D] of each rank
    name = {"attn": "self_attn.o_proj.bias", "mlp": "mlp.down_proj.bias"}[wrong.block]
    bias = wrong.w(name)  # [D], or None
    total, once = sum(parts), 0 if bias is None else bias  # [T, D], [D]
    if bias is not None:
        yield "the bias is left out", total
        yield "the bias is added twice", total + 2 * bias
    if len(parts) == 1:
        return
    if bias is not None:
        yield "the bias is added on each rank", total + len(parts) * bias
    yield "the sum over the ranks is left out: each rank has its own partial sum", parts[wrong.rank] + once
    for rank, part in enumerate(parts):
        yield f"the partial sum of rank {rank} is left out", total - part + once
    for rank, part in enumerate(parts):
        yield f"the partial sum of rank {rank} is added twice", total + part + once
        yield f"only the partial sum of rank {rank}, in place of all", part + once
    yield "the sum is divided by the number of ranks: a mean", total / len(parts) + once
    yield "the partial sums are summed twice", len(parts) * total + once
    yield "the largest partial sum, not their sum", np.max(parts, axis=0) + once


def partial_sum_mistakes(wrong, x, name, result):
    """Try the parts of other ranks in a row-parallel weight, and a bias in each partial sum.

    Parameters
    ----------
    wrong : WrongStep
    x : float64 array [T, in]
    name : str
        The name of the projection.
    result : callable
        A function result(x, weight, bias) that returns the step.
    """
    weight, bias = wrong.w(f"{name}.weight"), wrong.w(f"{name}.bias")
    if bias is not None:
        yield "the bias is added to the partial sum, not once after the sum", result(x, weight, bias)
    for rank in wrong.other_ranks:
        yield (
            f"the columns of the weight are those of rank {rank}",
            result(x, wrong.w(f"{name}.weight", rank=rank), None),
        )
    if wrong.other_ranks:
        step = len(wrong.cases)
        dealt = wrong.whole(f"{name}.weight")[:, wrong.rank :: step]  # [out, in]
        yield f"the columns of the weight are every {nth(step)} one, not a block", result(x, dealt, None)


def part_mistakes(wrong, x, name, heads, result):
    """Try the parts of other ranks in a column-parallel weight; parameters as in `partial_sum_mistakes`.

    `heads` is whether the rows of the weight are those of heads.
    """
    weight, bias = wrong.w(f"{name}.weight"), wrong.w(f"{name}.bias")
    for rank in wrong.other_ranks:
        other = wrong.w(f"{name}.weight", rank=rank)
        other_bias = wrong.w(f"{name}.bias", rank=rank)
        yield f"the rows of the weight are those of rank {rank}", result(x, other, other_bias)
        yield f"the rows of the weight are those of rank {rank}", result(x, other, bias)
        if bias is not None:
            yield f"the bias is that of rank {rank}", result(x, weight, other_bias)
    if not wrong.other_ranks:
        return
    count, unit = len(wrong.cases), wrong.reference.head_dim if heads else 1

    def dealt(tensor):
        return (
            None
            if tensor is None
            else np.concatenate(np.split(tensor, len(tensor) // unit)[wrong.rank :: count])
        )

    each = dealt(wrong.whole(f"{name}.weight")), dealt(wrong.whole(f"{name}.bias"))  # [out, in], [out]
    joined = [of_joined(wrong, name, kind) for kind in ("weight", "bias")]  # [out, in], [out]
    yield (
        "the rows are those of a joined matrix that is split as a whole, not part by part",
        result(x, *joined),
    )
    what = "heads are every {} head" if heads else "rows are every {} row"
    yield f"the {what.format(nth(count))}, not a block", result(x, *each)


def of_joined(wrong, name, kind):
    """Return the part of a tensor if its joined matrix is split over the ranks as a whole; or None."""
    block, _, own = name.rpartition(".")
    names = next((parts for parts in JOINED if own in parts), ())
    tensors = [wrong.whole(f"{block}.{part}.{kind}") for part in names]
    if not tensors or any(tensor is None for tensor in tensors):
        return None
    sizes = [len(wrong.w(f"{block}.{part}.{kind}")) for part in names]
    chunk = np.array_split(np.concatenate(tensors), len(wrong.cases))[wrong.rank]  # [2 F / ranks, in]
    return np.split(chunk, np.cumsum(sizes))[names.index(own)] if sum(sizes) == len(chunk) else None


def norm_over_part(wrong, x, weight, eps):
    """Try a mean of squares over a part of the hidden size: x [T, D], weight [D]."""
    count = len(wrong.cases)
    if count == 1:
        return
    for rank, part in enumerate(np.array_split(x, count, axis=-1)):  # [T, D / count] each
        root = np.sqrt(np.mean(part * part, axis=-1, keepdims=True) + eps)  # [T, 1]
        whose = "this rank's" if rank == wrong.rank else f"rank {rank}'s"
        yield f"the mean of squares is that of {whose} part of the hidden size", x / root * weight


def vocabulary_mistakes(wrong, table, ids, scale):
    """Try mistakes in an embedding whose rows are divided among the ranks: table [V, D], ids [T]."""
    for rank, (start, stop) in enumerate(wrong.case.plan.vocab_ranges):
        inside = (start <= ids) & (ids < stop)  # [T]
        if len(wrong.cases) == 1 or not inside.any():
            continue
        text = f"of the tokens of rank {rank} (ids {start} to {stop - 1}), the rows "
        right_rows, size = table[ids] * scale, stop - start  # [T, D], one number

        def with_rows(rows, inside=inside, right_rows=right_rows):
            return np.where(inside[:, None], rows * scale, right_rows)  # [T, D]

        yield text + "are left out", with_rows(np.zeros_like(right_rows))
        for offset in (1, -1):
            rows = table[start + (ids - start + offset) % size]  # [T, D]
            yield text + f"are off by {offset}", with_rows(rows)
        yield text + "are added on each rank", with_rows(len(wrong.cases) * table[ids])
        yield text + "are those of rank 0", with_rows(table[(ids - start) % size])


def gathered_mistakes(wrong, logits):
    """Try another order of the ranks' columns: logits [n, V]."""
    ranges = wrong.case.plan.vocab_ranges
    if len(ranges) == 1:
        return
    columns = [logits[:, start:stop] for start, stop in ranges]  # [n, V_r] each
    yield "the ranks' columns are in another order: the reverse one", np.concatenate(columns[::-1], axis=-1)
    if len({part.shape for part in columns}) == 1:
        woven = np.stack(columns, axis=-1).reshape(logits.shape)  # [n, V]
        yield "the ranks' columns are interleaved, not one after another", woven


def nth(number):
    """Return an ordinal number as text.

    >>> nth(2), nth(3), nth(4)
    ('2nd', '3rd', '4th')
    """
    return str(number) + {2: "nd", 3: "rd"}.get(number, "th")
