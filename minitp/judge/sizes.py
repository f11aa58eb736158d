"""The sizes of a rank's arrays, and the sharding plan that follows from them."""

from itertools import accumulate, pairwise

from minitp.shard import plan_of_ranges
from minitp.trace.names import full_name, split_name
from minitp.util.shares import split_evenly

# The steps that show how many heads, columns or rows a rank has, and the letters of their other axes but T.
WITNESSES = {
    "H": (("attn.q_rope", "d"), ("attn.q", "d"), ("attn.q_norm", "d"), ("attn.context", "d")),
    "F": (("mlp.gate", ""), ("mlp.up", ""), ("mlp.act", ""), ("mlp.experts", "X")),
}


def elements(entry):
    """Return the number of elements of an Entry."""
    count = 1
    for size in entry.shape:
        count *= size
    return count


def sizes_of(files, rank, config, spans):
    """Return the size of each letter of `trace.names` in the arrays of a rank, without those of K, T and S.

    Sizes that no array shows are those of torch.chunk.

    Parameters
    ----------
    files : list of RankFile
    rank : int
    config : Config
    spans : dict of str to (int, int)
        The positions of each pass.
    """
    whole = whole_sizes(config)
    sizes = {
        "D": config.hidden_size,
        "d": config.head_dim,
        "E": config.num_local_experts,
        "X": config.num_experts_per_tok,
        "V": config.vocab_size,
    }
    entries = files[rank].entries
    for letter, witnesses in WITNESSES.items():
        start, stop = chunks(whole[letter], len(files))[rank]
        seen = shown(entries, witnesses, sizes, spans, config.num_hidden_layers)
        sizes[letter] = next(seen, max(1, stop - start))
    first = next(iter(spans))
    partial, rows = entries.get(f"{first}/logits_partial"), rows_of_logits([files[rank]], first, config)
    sizes["V_r"] = elements(partial) // rows if partial and rows else config.vocab_size
    return sizes


def whole_sizes(config):
    """Return the sizes of the axes that are split over the ranks."""
    return {
        "H": config.num_attention_heads,
        "K": config.num_key_value_heads,
        "F": config.intermediate_size,
    }


def own_sizes(plan, rank):
    """Return the sizes of a rank's part of these axes, according to a Plan."""
    ranges = {"H": plan.head_ranges, "K": plan.kv_head_ranges, "F": plan.ffn_ranges}
    return {letter: of_rank[rank][1] - of_rank[rank][0] for letter, of_rank in ranges.items()}


def shown(entries, witnesses, sizes, spans, layers):
    """Yield the size of an axis in each array that shows it."""
    for name, (start, stop) in spans.items():
        for layer in range(layers):
            for step, other in witnesses:
                entry = entries.get(full_name(name, layer, step))
                if entry is not None:
                    yield elements(entry) // ((stop - start) * (sizes[other] if other else 1))


def rows_of_logits(ranks, pass_name, config):
    """Return the number of rows of logits in a pass; without logits, that of rows of the last norm.

    Logits of a part of the vocabulary count as one row, so that they are not passed over. Rows of a padded
    vocabulary are longer.
    """
    least = 0
    for step, width in (("logits", config.vocab_size), ("final_norm", config.hidden_size)):
        entries = [rank.entries[name] for rank in ranks if (name := f"{pass_name}/{step}") in rank.entries]
        counts = [elements(entry) // padded_width(entry, width) for entry in entries]
        if any(counts):
            return max(counts)
        least = max(least, len(counts) > 0)
    return int(least)


def padded_width(entry, width):
    """Return the length of the rows of an array, which is `width` or, with padding, larger."""
    last = entry.shape[-1] if entry.shape else 0
    return last if last > width and last % width else width


def plan_of(config, sizes):
    """Return the Plan for the sizes of each rank's arrays, a dict from letter to size for each rank."""
    letters = {"H": config.num_attention_heads, "F": config.intermediate_size, "V_r": config.vocab_size}
    ranges = [ranges_of([each[letter] for each in sizes], whole) for letter, whole in letters.items()]
    return plan_of_ranges(config, *ranges)


def ranges_of(sizes, whole):
    """Return the (start, stop) of each rank, for the sizes of its arrays along an axis.

    If every rank has the whole axis, the ranges are those of torch.chunk; a rank is then judged for its own
    range. If the sizes do not add up to the axis, they are wrong, and the ranges are those of minitp.

    >>> ranges_of([3, 3, 1], 7), ranges_of([7, 7], 7), ranges_of([3, 3], 7)
    (((0, 3), (3, 6), (6, 7)), ((0, 4), (4, 7)), ((0, 4), (4, 7)))
    """
    if sum(sizes) == whole:
        return tuple(pairwise([0, *accumulate(sizes)]))
    return (chunks if all(size == whole for size in sizes) else split_evenly)(whole, len(sizes))


def chunks(whole, ranks):
    """Return the (start, stop) of each rank if range(whole) is split as by torch.chunk.

    >>> chunks(10, 4)
    ((0, 3), (3, 6), (6, 9), (9, 10))
    """
    size = -(-whole // ranks)
    return tuple(pairwise(min(rank * size, whole) for rank in range(ranks + 1)))


def shape_of(name, sizes, tokens, count, letters):
    """Return the shape that an array of `count` elements should have, from the letters of its step.

    `tokens` is the number of tokens of the pass. The number of rows of the steps after the layers, and of
    positions in a cache, follows from `count`.
    """
    sizes = sizes | {"T": tokens, "Hd": sizes["H"] * sizes["d"]}
    step = split_name(name)[2]
    if step == "logits_partial":
        sizes["V"] = sizes["V_r"]
    free = "S" if "S" in letters else "T" if step in ("final_norm", "logits", "logits_partial") else None
    if free:
        known = 1
        for letter in letters:
            known *= 1 if letter == free else sizes[letter]
        sizes[free] = count // max(1, known)
    return tuple(sizes[letter] for letter in letters)
