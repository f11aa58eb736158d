"""The result of `minitp lint` as text."""

import re

from minitp.cli.color import judged
from minitp.lint.pieces import PADDING
from minitp.lint.words import numbers_text, part_word
from minitp.util.format import aligned, counted

LINES = 20  # maximum number of faults, and of notes, that are listed
RANKS = 4  # ranks whose ranges a row lists
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|(?<=weight)\d+$|(?<=\[)\d+(?=\])|(?<=\(expert )\d+(?=\))")
HEADER = ("tensor", "", "part", "along", "on each rank", "verdict")


def text(result, path, source, ranks, verbose, stream):
    """Return the table, the faults and notes, and the verdict."""
    by_content = sum(not tensor.by_name for tensor in result.tensors)
    names = [f"names of {result.engine}"] if by_content < len(result.tensors) else []
    names += [f"{counted(by_content, 'tensor')} found by content"] if by_content else []
    title = f"{path}: {counted(ranks, 'rank')}, {', '.join(names)}, compared with {source.name}"
    lines = [title, "", *table(result, verbose), ""]
    lines += listed("wrong", result.faults, verbose) + listed("note", result.notes, verbose)
    if result.is_other_model:
        lines += ["note: most values are not those of the checkpoint; is it the one that was sharded?", ""]
    lines.append(judged(verdict(result, ranks), not result.faults, stream))
    return "\n".join(lines) + "\n"


def verdict(result, ranks):
    """Return the last line: that all tensors are right, or the first wrong one."""
    if result.faults:
        name, fault = next(iter(result.faults.items()))
        count = f"{counted(len(result.faults), 'tensor')} are wrong; " if len(result.faults) > 1 else ""
        return f"{count}first wrong tensor: {name}: {fault}"
    count = f"{counted(len(result.tensors), 'tensor')} on {counted(ranks, 'rank')}"
    return f"all right: {count}; each row is on one rank, or on several for a reason"


def table(result, verbose):
    """Return the table of tensors, the wrong ones first; tensors of several layers share a row."""
    groups = {}
    for tensor in result.tensors:
        cells = rows_of(tensor, result)
        pattern = tensor.name if verbose else NUMBER.sub("*", tensor.name)
        groups.setdefault((pattern, tuple(cells)), []).append(tensor.name)
    found = []
    for (pattern, cells), names in groups.items():
        is_wrong = names[0] in result.faults
        called, count = (names[0], "") if len(names) == 1 else (pattern, f"x {len(names)}")
        lines = [(called, count, *cells[0]), *(("", "", *cell) for cell in cells[1:])]
        found.append((not is_wrong, lines))
    found.sort(key=lambda group: group[0])  # keeps the order of the checkpoint otherwise
    columns = zip(*[HEADER, *(line for _, lines in found for line in lines)], strict=True)
    filled = [column for column in columns if any(column[1:])]
    return aligned(list(zip(*filled, strict=True)), "<" * len(filled))


def rows_of(tensor, result):
    """Return the cells of a tensor after its name: part, axis, ranges and verdict, for each part."""
    parts, pieces = tensor.layout.parts, result.pieces
    wrong = tensor.name in result.faults
    if not parts:
        return [("", "", "", "wrong")]
    along = f"{pieces.word(parts[0], tensor.held[tensor.holders[0]].source_axis)}s"
    rows = []
    for part in parts:
        held = [None if one is None else one.codes for one in tensor.held]
        own = [None if codes is None else pieces.pieces_of(part, codes) for codes in held]
        padding = sum(int((codes == PADDING).sum()) for codes in held if codes is not None)
        word = part_word(part) if len(parts) > 1 else ""
        if not tensor.by_name:
            word = part
        kind = "wrong" if wrong else kind_of(tensor, own, pieces.count(part), padding, result)
        rows.append((word, along, ranges(own), kind))
    return rows


def kind_of(tensor, own, total, padding, result):
    """Return the verdict of a part of a tensor that is right."""
    held = [numbers for numbers in own if numbers is not None]
    if len(own) > 1 and len(held) == len(own) and all(len(numbers) == total for numbers in held):
        return "whole on every rank"
    twice = sum(len(numbers) for numbers in held) > total
    kind = "with their query heads" if twice else "each once"
    if padding and len(tensor.layout.parts) == 1:
        kind += f", {padding} of padding"
    return kind + (", see the note" if tensor.name in result.notes else "")


def ranges(own):
    """Return what each rank holds, in rank order; many ranks are left out."""
    texts = ["-" if numbers is None or not len(numbers) else numbers_text(numbers) for numbers in own]
    if len(texts) > RANKS:
        texts = [*texts[: RANKS - 1], "..", texts[-1]]
    if len(set(texts)) == 1:
        return texts[0]
    return " | ".join(texts)


def listed(word, texts, verbose):
    """Return faults or notes as lines; those of several layers that differ only in numbers share a line."""
    groups = {}
    for name, what in texts.items():
        alike = name if verbose else (NUMBER.sub("*", name), re.sub(r"\d+(\.\d+)?(e-?\d+)?", "#", what))
        groups.setdefault(alike, []).append((name, what))
    lines = []
    for group in groups.values():
        name, what = group[0]
        if len(group) > 1:
            name = f"{NUMBER.sub('*', name)} x {len(group)}"
            what = what if len({text for _, text in group}) == 1 else f"the first of them: {what}"
        lines.append(f"{word}: {name}: {what}")
    more = [f"and {len(lines) - LINES} more"] if len(lines) > LINES else []
    return lines[:LINES] + more + ([""] if lines else [])
