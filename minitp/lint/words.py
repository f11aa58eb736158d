"""Pieces in words: rows 0:64, columns 3, 5, .. 63, padding."""

import re

import numpy as np

from minitp.lint.pieces import PADDING, piece_numbers

RUNS = 3  # runs that a text lists


def short_name(name, other=""):
    """Return a tensor's name without its layer, if `other` is in the same layer, and without `weight`.

    >>> short_name("model.layers.3.self_attn.q_proj.weight", "model.layers.3.mlp.up_proj.weight")
    'self_attn.q_proj'
    """
    layer = re.match(r"model\.layers\.\d+\.", name)
    same = layer and (not other or other.startswith(layer[0]))
    return (name[layer.end() :] if same else name).removesuffix(".weight")


def part_word(name):
    """Return the short word for a part of a joined tensor.

    >>> part_word("model.layers.0.self_attn.q_proj.weight"), part_word("model.layers.0.mlp.up_proj.bias")
    ('q', 'up')
    """
    word = name.split(".")[-2]
    return {"w1": "gate", "w3": "up", "w2": "down"}.get(word, word.removesuffix("_proj"))


def numbers_text(numbers):
    """Return some numbers as ranges; a step other than 1 is spelled out.

    >>> numbers_text([0, 1, 2, 8, 9]), numbers_text([1, 3, 5, 7]), numbers_text([4]), numbers_text([])
    ('0:3, 8:10', '1, 3, .. 7', '4', 'none')
    """
    numbers = np.asarray(numbers)
    if not len(numbers):
        return "none"
    steps = np.diff(numbers)
    if len(numbers) > 2 and len(set(steps.tolist())) == 1 and steps[0] != 1:
        return f"{numbers[0]}, {numbers[1]}, .. {numbers[-1]}"
    runs = np.split(numbers, np.flatnonzero(steps != 1) + 1)
    texts = [f"{run[0]}:{run[-1] + 1}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(texts[:RUNS]) + (", .." if len(runs) > RUNS else "")


def heads_text(heads):
    """Return the heads of a rank in order; -1 is a head of zeros.

    >>> heads_text([0, 1, -1, -1, 2]), heads_text([])
    ('0:2, 2 of zeros, 2', 'none')
    """
    heads = np.array(heads, int)
    runs = np.split(heads, np.flatnonzero(np.diff(heads < 0)) + 1)
    texts = [f"{len(run)} of zeros" if (run < 0).any() else numbers_text(run) for run in runs]
    return ", ".join(texts[: RUNS + 1]) + (", .." if len(texts) > RUNS + 1 else "")


def held_text(held, layout, pieces):
    """Return what a rank holds of a tensor, in the order in which it holds it."""
    codes, word = held.codes, pieces.word(layout.parts[0], held.source_axis)
    if len(codes) == 0:
        return "nothing"
    if not (codes >= 0).any():
        return f"{len(codes)} {word}s of zeros" if codes[0] == PADDING else f"{len(codes)} unknown {word}s"
    kinds = np.where(codes >= 0, codes >> 32, codes)
    texts = []
    for run in np.split(codes, np.flatnonzero(np.diff(kinds)) + 1):
        if run[0] < 0:
            texts.append(f"{len(run)} {'of padding' if run[0] == PADDING else 'unknown'}")
            continue
        name, numbers = pieces.names_in(run)[0], numbers_text(piece_numbers(run))
        if len(layout.parts) > 1 and name in layout.parts:
            texts.append(f"{part_word(name)} {numbers}")
        elif layout.parts == (name,):
            texts.append(f"{plural(word, run)} {numbers}")
        else:
            texts.append(f"{plural(word, run)} {numbers} of {short_name(name, layout.parts[0])}")
    return ", ".join(texts[: RUNS + 1]) + (", .." if len(texts) > RUNS + 1 else "")


def plural(word, numbers):
    """Return a noun in the number that fits."""
    return word if len(numbers) == 1 else f"{word}s"


def ranks_text(ranks):
    """Return ranks as text.

    >>> ranks_text([1]), ranks_text([0, 1]), ranks_text([0, 1, 2])
    ('rank 1', 'ranks 0 and 1', 'ranks 0, 1 and 2')
    """
    names = [str(rank) for rank in ranks]
    if len(names) == 1:
        return f"rank {names[0]}"
    return f"ranks {', '.join(names[:-1])} and {names[-1]}"
