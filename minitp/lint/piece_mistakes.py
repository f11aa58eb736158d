"""The mistakes in which rows or columns a rank holds, and in their values.

Each function receives a WrongTensor and returns a text, or "" if the tensor is not wrong in this way.
"""

import re
from dataclasses import replace

import numpy as np

from minitp.lint.pieces import PADDING, UNKNOWN
from minitp.lint.words import held_text, numbers_text, ranks_text, short_name
from minitp.lint.wrong_tensor import SHOWN, described


def not_written(case):
    """Name shards of zeros."""
    pairs = zip(case.ranks, case.found, strict=True)
    zeros = [rank for rank, codes in pairs if len(codes) and (codes == PADDING).all()]
    return f"all values are zero on {ranks_text(zeros)}: never written?" if zeros else ""


def changed_values(case):
    """Name shards whose values are similar to the checkpoint's, or unknown."""
    for rank, held in zip(case.ranks, case.held, strict=True):
        if held.values:
            where = "" if held.changed.all() else f" in {held.changed.sum()} of {len(held.codes)} {case.word}"
            return f"rank {rank} {held.values}{where}"
    for rank, held in zip(case.ranks, case.held, strict=True):
        unknown = np.flatnonzero(held.codes == UNKNOWN)
        if len(unknown) == len(held.codes) > 0:
            return f"rank {rank} has none of its {case.word} from the checkpoint{wrong_width(case, rank)}"
        if len(unknown):
            where = f"{case.word} {numbers_text(unknown)} of rank {rank}"
            return f"{where} are not in the checkpoint"
    return ""


def wrong_width(case, rank):
    """Return a text about the shape of a shard whose other axis has the wrong size."""
    axis = case.pieces.axis(case.layout.parts[0])
    shape, size = case.tensor.shapes[rank], case.pieces.shape(case.layout.parts[0])[1 - axis]
    if shape[1 - axis] == size:
        return ""
    return f": its shape is {list(shape)}, expected {size} along axis {1 - axis}"


def transposed(case):
    """Name shards that are transposed, or split along the wrong axis."""
    if case.along or not case.found:
        return ""
    natural = case.pieces.axis(case.layout.parts[0])
    wrong = (i for i, held in enumerate(case.held) if (held.axis, held.source_axis) != (natural, natural))
    i = next(wrong)
    held = case.held[i]
    has = f"rank {case.ranks[i]} has {held_text(held, case.layout, case.pieces)}"
    if held.axis != held.source_axis:
        return f"transposed: {has}, along its axis {held.axis}"
    return f"split along the wrong axis: {has}, expected a share of the {case.word}"


def other_tensor(case):
    """Name shards of another tensor: of another layer, or another matrix of the same layer."""
    parts, names = case.layout.parts, case.pieces.names_in(np.concatenate(case.found))
    foreign = [name for name in names if name not in parts]
    if not foreign:
        return ""
    pairs = zip(case.ranks, case.found, strict=True)
    ranks = [rank for rank, codes in pairs if set(case.pieces.names_in(codes)) & set(foreign)]
    where = f" on {ranks_text(ranks)}" if len(ranks) < case.expectation.tp else ""
    for pattern, noun in ((r"layers\.(\d+)\.", "layer"), (r"experts\.(\d+)\.", "expert")):
        numbers = {number for name in foreign for number in re.findall(pattern, name)}
        same = {re.sub(pattern, "", name) for name in foreign} == {
            re.sub(pattern, "", part) for part in parts
        }
        if same and len(numbers) == 1:
            own = re.search(pattern, parts[0])[1]
            return f"holds the tensor of {noun} {numbers.pop()}, not {own}{where}"
    if len(foreign) == 1:
        return f"has {case.word} of {short_name(foreign[0], case.layout.parts[0])}{where}"
    return ""


def exchanged_ranks(case):
    """Name ranks that have the pieces of other ranks."""
    if not case.right or len(case.ranks) < 2:
        return ""
    owners = []
    for rank, codes, own in zip(case.ranks, case.found, case.right, strict=True):
        others = zip(case.ranks, case.right, strict=True)
        same = [other for other, right in others if np.array_equal(codes, right)]
        if not case.along or not same:
            return ""
        owners.append(rank if np.array_equal(codes, own) else same[0])
    moved = [(rank, owner) for rank, owner in zip(case.ranks, owners, strict=True) if rank != owner]
    texts = [f"rank {rank} has the {case.word} of rank {owner}" for rank, owner in moved]
    text = ", ".join(texts[:SHOWN]) + (", .." if len(texts) > SHOWN else "")
    if sorted(owners) == case.ranks:
        return f"ranks exchanged: {text}"
    lost = [right for rank, right in zip(case.ranks, case.right, strict=True) if rank not in owners]
    missing = replace(case.held[0], codes=lost[0])
    return f"{text}; {held_text(missing, case.layout, case.pieces)} are on no rank"


def cut_replicated(case):
    """Name a tensor that every rank should hold whole, of which ranks hold a part."""
    if case.pieces.is_split(case.layout.parts[0]) or not case.right:
        return ""
    total = case.pieces.count(case.layout.parts[0])
    i = next((i for i, codes in enumerate(case.found) if len(codes) < total), None)
    if i is None:
        return ""
    has = f"rank {case.ranks[i]} has {len(case.found[i])} of {total} {case.word}"
    return f"split, but every rank needs all of it: {has}"


def padding_inside(case):
    """Name padding before the end; heads of zeros are judged with the other tensors of their block."""
    if ".self_attn." in case.layout.parts[0]:
        return ""
    codes = np.concatenate(case.found)
    real = np.flatnonzero(codes >= 0)
    if not case.along or not len(real) or not (codes[: real[-1]] == PADDING).any():
        return ""
    for rank, found in zip(case.ranks, case.found, strict=True):
        if (found == PADDING).any():
            has = f"rank {rank} has {int((found == PADDING).sum())} {case.word} of zeros"
            return f"padding before the end: {has}; {described(case)}"
    return ""


def off_by_a_block(case):
    """Name ranges that begin too early or too late."""
    total = sum(case.pieces.count(part) for part in case.layout.parts)
    if not case.right or not case.along or sum(map(len, case.found)) < total:
        return ""
    offsets = set()
    for codes, right in zip(case.found, case.right, strict=True):
        if np.array_equal(codes, right) or not len(codes):
            continue
        if len(codes) != len(right) or not (np.diff(codes) == 1).all() or not (np.diff(right) == 1).all():
            return ""
        offsets.add(int(codes[0] - right[0]))
    if len(offsets) != 1:
        return ""
    offset = offsets.pop()
    return f"off by {abs(offset)} {case.word}: {described(case)}"


def strided(case):
    """Name a split in which the ranks take turns."""
    if len(case.ranks) < 2 or not case.along:
        return ""
    d, tp = case.expectation.config.head_dim, len(case.ranks)
    for size, noun in ((1, case.word), (d, "heads")):
        codes = []
        for rank in range(tp):
            numbers = []
            for part in case.layout.parts:
                all_numbers = np.arange(case.pieces.count(part))
                numbers.append(all_numbers[(all_numbers // size) % tp == rank])
            codes.append(case.expectation.joined(case.layout, numbers))
        if case.fits(codes):
            return f"strided: the ranks take turns with {noun}; {described(case)}"
    return ""
