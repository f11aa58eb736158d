"""The look-up of an engine's tensor: its names in a checkpoint, and the order of its rows."""

import re
from dataclasses import replace

from minitp.mapping.table import GROUPED, EngineTensor
from minitp.mapping.tensors import checkpoint_names, tensor_tables

SIGNS = {  # a part of a name that only this engine has
    "megatron": r"\bdecoder\.layers\.|^embedding\.word_embeddings|^output_layer\.",
    "llama.cpp": r"^blk\.|^token_embd\.|^output_norm\.",
    "mlx": r"\.switch_mlp\.",
    "vllm": r"\.w13_weight$|\.w2_weight$|\.self_attn\.qkv_proj\.|\.mlp\.gate_up_proj\.",
}


def engine_of(names):
    """Return the engine whose names some tensors have; "hf" if they are those of no other engine."""
    return next(
        (engine for engine, sign in SIGNS.items() if any(re.search(sign, name) for name in names)), "hf"
    )


def number_pattern(name):
    """Return a compiled pattern of a name with {i} and {n}, whose numbers are the groups i and n."""
    pattern = re.escape(name)
    for letter in "in":
        pattern = pattern.replace(rf"\{{{letter}\}}", rf"(?P<{letter}>\d+)")
    return re.compile(pattern)


class TensorLookup:
    """The tensors of an engine, for one model.

    Parameters
    ----------
    engine : str
        A key of `tensors.tensor_tables`.
    config : Config
    """

    def __init__(self, engine, config):
        self._words = checkpoint_names(config)
        tensors = tensor_tables(config)[engine].items()
        self._table = [(number_pattern(name), tensor) for name, tensor in tensors]

    def find(self, name):
        """Return the EngineTensor of a name, with the checkpoint's own names as `parts`.

        Parts of stacked experts keep {n}. A name that the table does not list is taken for a checkpoint's.

        >>> from minitp.loading.source import open_config
        >>> lookup = TensorLookup("megatron", open_config("random:smollm2-135m"))
        >>> lookup.find("decoder.layers.3.mlp.linear_fc1.weight").parts
        ('model.layers.3.mlp.gate_proj.weight', 'model.layers.3.mlp.up_proj.weight')
        """
        name = name.removeprefix("module.")  # of DistributedDataParallel and its kin
        for pattern, tensor in self._table:
            found = pattern.fullmatch(name)
            if found:
                numbers = found.groupdict()
                words = {"i": numbers.get("i"), "n": numbers.get("n", "{n}")}
                parts = [part.format_map(self._words | {"i": "{i}"}) for part in tensor.parts]
                return replace(tensor, parts=tuple(part.format_map(words) for part in parts))
        return EngineTensor((name,))


def rows_on_rank(tensor, plan, rank, head_dim):
    """Return the rows of the checkpoint that an engine's tensor has on a rank, in order.

    The engine is assumed to split as `plan` does. Rows of q and k are in half-split order.

    Parameters
    ----------
    tensor : EngineTensor
        A tensor without stacked experts.
    plan : Plan
    rank : int
    head_dim : int

    Returns
    -------
    list of (part, start, stop)
    """
    ranges = {part: plan.tensors[part].index(rank)[0] for part in tensor.parts}
    if tensor.order != GROUPED:
        return [(part, rows.start, rows.stop) for part, rows in ranges.items()]
    q, k, v = tensor.parts
    first, found = plan.head_ranges[rank][0], []
    for group, (start, stop) in enumerate(plan.query_groups(rank)):
        kv = (plan.kv_head_ranges[rank][0] + group) * head_dim
        found += [
            (q, (first + start) * head_dim, (first + stop) * head_dim),
            (k, kv, kv + head_dim),
            (v, kv, kv + head_dim),
        ]
    return found
