"""The part that two arrays share if no layout explains their shapes: some positions, or one sequence.

Four cases are recognized, and combinations of them. The axes are known by their letters in `trace.names`, so
an array with an unknown name is never compared in part.

    A is [T, V], B may be    [1, V], [V]    only the last token's logits
    A is [T, V], B may be    [T, V + n]     a padded vocabulary
    A is [T, D], B may be    [T + n, D]     padding after the tokens or before them, or other positions
    A is [T, D], B may be    [2, T, D]      a batch
                             [2 * T, D]     a batch whose tokens lie one after another

The values decide which end of the axis, and which sequence of the batch, is compared; see `run`.
"""

import math
from dataclasses import replace
from itertools import combinations

from minitp.compare.layouts import Layout, layouts
from minitp.trace.names import AFTER, split_name
from minitp.util.format import counted

POSITIONS = "T", "S"  # tokens of the pass and tokens in the cache
VOCABULARY = "V"
MOST_SEQUENCES = 64  # a longer first axis is not taken for a batch
TABLES = ("weights/model.embed_tokens.weight", "weights/lm_head.weight")  # [V, D]


def partial_layouts(name, a_shape, b_shape, letters):
    """Return the Layouts of the parts that both arrays have, the likeliest first; [] if there are none.

    Parameters
    ----------
    name : str
        Name of the step.
    a_shape, b_shape : tuple of int
    letters : list of str or None
        Letters of A's axes.
    """
    letters = ["V", "D"] if name in TABLES else letters
    if letters is None or len(letters) != len(a_shape):
        return []
    has_logits = split_name(name)[2] in AFTER
    found = _other_sizes(a_shape, b_shape, letters, has_logits)
    inner = b_shape[1:]
    is_batch = 1 < (b_shape[:1] or (1,))[0] <= MOST_SEQUENCES
    joined = letters[0] in "HK" and a_shape[0] > 1 and len(inner) == len(a_shape) - 1  # heads and dimensions
    if not is_batch or len(inner) < len(a_shape) - has_logits - joined:
        return found + _flat_batch(a_shape, b_shape, letters)
    whole = layouts(a_shape, inner, letters)
    each = whole if whole or joined else _other_sizes(a_shape, inner, letters, has_logits)
    batch = [_of_batch(layout, i, b_shape[0]) for i in range(b_shape[0]) for layout in each]
    return batch + found if whole else found + batch


def _flat_batch(a_shape, b_shape, letters):
    """Return the Layouts of the sequences in a batch whose tokens lie one after another, as [B * T, ..]."""
    count = b_shape[0] // max(a_shape[0], 1) if b_shape and a_shape else 0
    if letters[0] != "T" or not 1 < count <= MOST_SEQUENCES or b_shape != (count * a_shape[0], *a_shape[1:]):
        return []
    whole = Layout("", lambda array: array.reshape(count, *a_shape))
    return [_of_batch(whole, i, count, flat=True) for i in range(count)]


def _of_batch(layout, i, sequences, flat=False):
    """Return the Layout of sequence `i` of a batch, given that of a single sequence."""
    rest = f"B has {counted(sequences, 'sequence')}; number {i} is compared"
    return replace(
        layout,
        view=lambda array: layout.view(array)[i] if flat else layout.view(array[i]),
        rest="; ".join(filter(None, (rest, layout.rest))),
        sequence=i,
    )


def _other_sizes(a_shape, b_shape, letters, has_logits):
    """Return the Layouts for other numbers of positions, or another size of the vocabulary, in B.

    The first positions are the likeliest, except for a single position of the steps after the layers.
    """
    for sizes in _sizes(a_shape, b_shape, letters):
        shape = tuple(sizes.get(letter, n) for letter, n in zip(letters, a_shape, strict=True))
        whole = layouts(shape, b_shape, letters)
        if whole:
            ends = (True, False) if has_logits and sizes.get("T") == 1 else (False, True)
            ends = ends if set(sizes) & set(POSITIONS) else (False,)
            return [_cut(layout, a_shape, shape, letters, at_end) for at_end in ends for layout in whole]
    return []


def _sizes(a_shape, b_shape, letters):
    """Yield the possible sizes of B's axes that differ from A's, as dicts from letter to size."""
    a, elements = dict(zip(letters, a_shape, strict=True)), math.prod(b_shape)
    squeezed = [[n for n in shape if n != 1] for shape in (a_shape, b_shape)]
    differing = [i for i, (n, m) in enumerate(zip(*squeezed, strict=False)) if n != m]
    if len(squeezed[0]) == len(squeezed[1]) and len(differing) == 1:
        # In A's order, one axis has another size.
        named = [letter for letter, n in zip(letters, a_shape, strict=True) if n != 1]
        if named[differing[0]] not in (*POSITIONS, VOCABULARY):
            return
    for varied in (("T",), ("S",), (VOCABULARY,), ("T", "S"), ("T", VOCABULARY)):
        if not all(letter in a for letter in varied):
            continue
        fixed = math.prod(n for letter, n in a.items() if letter not in varied)
        # A merged axis would explain too much, so the sizes must be those of axes of B.
        for found in combinations((1, *b_shape), len(varied)):
            sizes = {letter: n for letter, n in zip(varied, found, strict=True) if n != a[letter]}
            # A fraction of the vocabulary is more likely one rank's part of it.
            in_full = a.get(VOCABULARY, 0) < 2 * sizes.get(VOCABULARY, math.inf)
            if fixed * math.prod(found) == elements > 0 and sizes and in_full:
                yield sizes


def _cut(layout, a_shape, shape, letters, at_end):
    """Return the Layout of the first or last elements that A and B, converted to `shape`, have in common."""
    a_part, b_part, texts = [], [], []
    for letter, n, m in zip(letters, a_shape, shape, strict=True):
        common = min(n, m)
        from_end = at_end and letter in POSITIONS
        a_part.append(slice(n - common, n) if from_end else slice(common))
        b_part.append(slice(m - common, m) if from_end else slice(common))
        if n != m:
            kind = {"T": "positions", "S": "cached positions"}.get(letter, "vocabulary entries")
            which = f"{'last' if from_end else 'first'}{f' {common}' if common > 1 else ''}"
            if m < n:
                texts.append(f"B has {m} of A's {n} {kind}, taken as the {which}")
            else:
                texts.append(f"B has {m} {kind} and A {n}; B's {which} {'are' if n > 1 else 'is'} compared")
    b_part, less = tuple(b_part), any(m < n for n, m in zip(a_shape, shape, strict=True))
    part = tuple(a_part) if less else (...,)
    return Layout(layout.text, lambda array: layout.view(array)[b_part], part, ", ".join(texts))


def reason(a_shape, b_shape, letters):
    """Describe why two arrays cannot be compared, with a likely cause if the sizes suggest one."""
    a, b = math.prod(a_shape), math.prod(b_shape)
    if a != b and b and a % b == 0:
        return f"B has 1/{a // b} of A's elements; is it one rank's part?"
    if a != b and a and b % a == 0 and letters and "K" in letters:
        return f"B has {b // a} times A's elements; are the KV heads repeated?"
    return "no order of A's axes has this shape"
