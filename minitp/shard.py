"""The sharding plan: which rows or columns of each tensor a rank holds.

A transformer layer is two pairs of matrices, and each pair is split the same way:

    column-parallel                        row-parallel
    w = [ w_0 | w_1 | w_2 | w_3 ]          w = [ w_0 ]      x @ w = x_0 @ w_0     rank 0
    y_r = x @ w_r                              [ w_1 ]            + x_1 @ w_1     rank 1
    every rank gets its own columns            [ w_2 ]            + x_2 @ w_2     rank 2
    of y and nobody waits                      [ w_3 ]            + x_3 @ w_3     rank 3

The columns that come out of the first (heads, or FFN columns) are just the rows that go into the second, so
a pair costs one all-reduce: the sum on the right. (Shoeybi et al., Megatron-LM, 2019, section 3.)
Drawn here as they are used, [in, out]; in a checkpoint they lie [out, in], so that a column of w is a row
of the file's tensor.

Which tensor is split how is said in `tensors`: column, row, or replicated. Here that becomes a Plan: which
heads, columns and rows each rank has.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

from minitp.errors import InputError
from minitp.tensors import JOINED, tensor_table


@dataclass(frozen=True)
class TensorShard:
    """How one checkpoint tensor is divided.

    Attributes
    ----------
    name : str
        Its name in the checkpoint; of a part of a tensor in JOINED the name that it would have by itself.
    shape : tuple of int
        The whole tensor, as in the file.
    axis : int or None
        The split axis; None if every rank holds all of it.
    ranges : tuple of (start, stop)
        What each rank holds along `axis`, in rank order; empty if `axis` is None.
    part_of : str or None
        The file's tensor in which it lies, if that has others too.
    first_row : int
        Where it begins there.
    """

    name: str
    shape: tuple
    axis: int | None
    ranges: tuple
    part_of: str | None = None
    first_row: int = 0

    def index(self, rank):
        """The slices that cut this rank's part out of the whole tensor."""
        whole = [slice(0, n) for n in self.shape]
        if self.axis is not None:
            whole[self.axis] = slice(*self.ranges[rank])
        return tuple(whole)

    def shape_on(self, rank):
        """The shape of this rank's part."""
        return tuple(s.stop - s.start for s in self.index(rank))


@dataclass(frozen=True)
class Plan:
    """Who computes what, for `tp` ranks. Each `*_ranges` holds one (start, stop) a rank.

    Query heads, FFN columns and vocabulary rows are dealt out as evenly as they go, each of them once. KV
    heads follow the query heads: a rank holds those that its own query heads read, so two ranks may both
    hold one. Nine query heads on three KV heads over four ranks:

        query heads   0 1 2 | 3 4 | 5 6 | 7 8
        KV heads        0   |  1  | 1 2 |  2
    """

    tp: int
    layers: int
    head_ranges: tuple
    kv_head_ranges: tuple
    ffn_ranges: tuple
    vocab_ranges: tuple
    tensors: dict  # checkpoint tensor name -> TensorShard
    experts: int = 0  # in each layer; all ranks hold their columns of every one

    def query_groups(self, rank):
        """For each KV head on this rank, in order, the (start, stop) of the local query heads that read it.

        Ragged groups are the normal case: in the drawing above rank 2 has [(0, 1), (1, 2)].
        """
        start, stop = self.head_ranges[rank]
        kv_start, kv_stop = self.kv_head_ranges[rank]
        # The last ranges end at H and at K.
        per_kv_head = self.head_ranges[-1][1] // self.kv_head_ranges[-1][1]
        return [
            (max(start, kv * per_kv_head) - start, min(stop, (kv + 1) * per_kv_head) - start)
            for kv in range(kv_start, kv_stop)
        ]


def split_evenly(n, parts):
    """`n` things in `parts` runs as even as they go: the first n % parts runs hold one more.

    >>> split_evenly(9, 4)
    ((0, 3), (3, 5), (5, 7), (7, 9))
    """
    size, longer = divmod(n, parts)
    edges = [r * size + min(r, longer) for r in range(parts + 1)]
    return tuple(pairwise(edges))


def make_plan(config, tp):
    """The plan of a model for `tp` ranks.

    Raises
    ------
    InputError
        if there are more ranks than attention heads (or than vocabulary rows), naming the sizes that work.
    """
    most = min(config.num_attention_heads, config.vocab_size)
    if not 1 <= tp <= most:
        raise InputError(
            f"--tp {tp}: this model has {config.num_attention_heads} attention heads and a rank needs at "
            f"least one; any size from 1 to {most} works"
        )
    heads = split_evenly(config.num_attention_heads, tp)
    per_kv_head = config.num_attention_heads // config.num_key_value_heads
    kv_heads = tuple((start // per_kv_head, (stop - 1) // per_kv_head + 1) for start, stop in heads)
    ffn = split_evenly(config.intermediate_size, tp)
    vocab = split_evenly(config.vocab_size, tp)

    d = config.head_dim
    ranges = {
        "V": vocab,
        "Hd": tuple((start * d, stop * d) for start, stop in heads),
        "Kd": tuple((start * d, stop * d) for start, stop in kv_heads),
        "F": ffn,
    }
    sizes = {
        "D": config.hidden_size,
        "d": d,
        "E": config.num_local_experts,
        "V": config.vocab_size,
        "Hd": config.num_attention_heads * d,
        "Kd": config.num_key_value_heads * d,
        "F": config.intermediate_size,
    }
    tensors = {}
    for name, split in tensor_table(config).items():
        shape = tuple(sizes[letter] for letter in split.shape)
        shared = () if split.axis is None else ranges[split.shape[split.axis]]
        tensors[name] = TensorShard(name, shape, split.axis, shared)
    if config.joined_projections:
        _place_in_joined(tensors, config.num_hidden_layers)
    return Plan(tp, config.num_hidden_layers, heads, kv_heads, ffn, vocab, tensors, config.num_local_experts)


def _place_in_joined(tensors, layers):
    """Say of each part of a tensor in JOINED where in the file it lies."""
    for i in range(layers):
        for joined, parts in JOINED.items():
            row = 0
            for name in (f"model.layers.{i}.{part}" for part in parts):
                tensors[name] = replace(tensors[name], part_of=f"model.layers.{i}.{joined}", first_row=row)
                row += tensors[name].shape[0]
