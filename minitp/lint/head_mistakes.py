"""The mistakes in the order of heads and of joined parts.

Each function receives a WrongTensor and returns a text, or "" if the tensor is not wrong in this way.
"""

from dataclasses import replace

import numpy as np

from minitp.lint.layout import ALTERNATING, KEY_OR_VALUE, QUERY_OR_KEY
from minitp.lint.words import held_text, part_word
from minitp.lint.wrong_tensor import described
from minitp.mapping.table import GROUPED, HALF_SPLIT, INTERLEAVED, PLAIN

ROPE_NAMES = {HALF_SPLIT: "half-split", INTERLEAVED: "interleaved"}


def kv_heads_modulo(case):
    """Name KV heads that are dealt out in turn, by h mod K or by rank mod K."""
    config, plan = case.expectation.config, case.expectation.plan
    kv = [part for part in case.layout.parts if KEY_OR_VALUE.search(part)]
    if not kv or plan is None or len(case.ranks) < plan.tp or (case.right and case.fits(case.right)):
        return ""
    count = config.num_key_value_heads
    by_head = [list(dict.fromkeys(h % count for h in range(*heads))) for heads in plan.head_ranges]
    sizes = {stop - start for start, stop in plan.kv_head_ranges}
    size = sizes.pop() if len(sizes) == 1 else 0  # KV heads of each rank, if all have as many
    by_rank = [[(rank * size + head) % count for head in range(size)] for rank in range(plan.tp)]
    right = f"expected h div (H / K), with H = {config.num_attention_heads}, K = {count}"
    for kv_heads, text in (
        (by_head, f"query head h is given KV head h mod K, {right}"),
        (by_rank, f"the ranks are given the KV heads in turn, as rank mod K, {right}"),
    ):
        if all(len(held) == count for held in kv_heads):
            continue  # all KV heads are on every rank, which says nothing about the rule
        pairs = zip(plan.head_ranges, kv_heads, strict=True)
        if case.fits([joined_heads(case, range(*queries), held, kv) for queries, held in pairs]):
            return f"{text}; {described(case)}"
    return ""


def joined_heads(case, queries, kv_heads, kv):
    """Return the codes of some query heads and KV heads in the layout of the case."""
    d = case.expectation.config.head_dim
    rows = [np.add.outer(np.array(heads) * d, np.arange(d)).ravel() for heads in (queries, kv_heads)]
    return case.expectation.joined(case.layout, [rows[part in kv] for part in case.layout.parts])


def joined_order(case):
    """Name the parts of a joined tensor in another order."""
    layout = case.layout
    arranged = [case.expectation.arranged(codes, layout) for codes in case.found]
    if len(layout.parts) < 2 or case.fits(arranged):
        return ""
    words = [part_word(part) for part in layout.parts]
    for other in other_orders(layout):
        if not case.fits([case.expectation.arranged(codes, other) for codes in case.found]):
            continue
        listed = ", ".join(part_word(part) for part in other.parts)
        if other.order == ALTERNATING:
            return f"the rows of {' and '.join(words)} alternate; the engine expects one part after the other"
        if other.order == GROUPED:
            return f"{listed} are interleaved for each KV head; the engine expects one after another"
        if layout.order == GROUPED:
            return f"in the order {listed}, one after another; the engine expects them grouped by KV head"
        if len(words) == 2:
            return f"{words[0]} and {words[1]} are exchanged: the order is {listed}"
        return f"the parts are in the order {listed}, expected {', '.join(words)}"
    return ""


def other_orders(layout):
    """Return all layouts of a joined tensor but its own."""
    if len(layout.parts) == 3:
        q, k, v = layout.parts
        plain = [layout.parts, (q, v, k), (k, q, v), (k, v, q), (v, k, q), (v, q, k)]
    else:
        plain = [layout.parts, layout.parts[::-1]]
    found = [replace(layout, order=PLAIN, parts=parts) for parts in plain]
    found += [replace(layout, order=order) for order in (GROUPED, ALTERNATING)]
    return [one for one in found if one != layout]


def joined_matrix_cut(case):
    """Name a joined matrix of which each rank has a contiguous piece."""
    if len(case.layout.parts) < 2 or len(case.ranks) < 2 or not case.along:
        return ""
    for order in (PLAIN, GROUPED):
        layout = replace(case.layout, order=order)
        totals = [range(case.pieces.count(part)) for part in layout.parts]
        whole = case.expectation.joined(layout, totals)
        if np.array_equal(np.concatenate(case.found), whole) and not (case.right and case.fits(case.right)):
            has = f"rank 0 has {held_text(case.held[0], case.layout, case.pieces)}"
            return (
                f"the joined matrix was cut into {len(case.ranks)} pieces: {has}; each part must be cut by "
                "itself, unless the engine gathers the outputs, as transformers does (--engine hf)"
            )
    return ""


def other_rope_layout(case):
    """Name query and key heads whose rows are in the order of the other RoPE layout."""
    layout = case.layout
    other = replace(layout, rope=INTERLEAVED if layout.rope == HALF_SPLIT else HALF_SPLIT)
    if not QUERY_OR_KEY.search(layout.parts[0]) or (case.right and case.fits(case.right)):
        return ""
    if not case.fits(case.expectation.codes(other, sizes(case))):
        return ""
    has = f"the {case.word} of each query and key head are {ROPE_NAMES[other.rope]}"
    return f"{has}, expected {ROPE_NAMES[layout.rope]}: the other RoPE layout"


def sizes(case):
    """Return the number of pieces on each rank, as in `Expectation.codes`."""
    counts = dict(zip(case.ranks, map(len, case.found), strict=True))
    return [counts.get(rank) for rank in range(case.expectation.tp)]
