"""The sharding plan: which rows or columns of each tensor a rank holds.

A transformer layer is two pairs of matrices, and each pair is split the same way:

    column-parallel                        row-parallel
    w = [ w_0 | w_1 | w_2 | w_3 ]          w = [ w_0 ]      x @ w = x_0 @ w_0     rank 0
    y_r = x @ w_r                              [ w_1 ]            + x_1 @ w_1     rank 1
    every rank computes its own                [ w_2 ]            + x_2 @ w_2     rank 2
    columns of y; no communication             [ w_3 ]            + x_3 @ w_3     rank 3

The columns that a rank computes with the first matrix (heads, or FFN columns) are exactly the inputs of its
rows of the second one, so a pair needs only one all-reduce: the sum on the right. (Shoeybi et al.,
Megatron-LM, 2019, section 3.) The matrices are drawn as they are used, [in, out]. A checkpoint stores them as
[out, in], so a column of w is a row of the tensor in the file.

The module `tensors` lists how each tensor is split: column, row, or replicated. `make_plan` turns that into a
Plan, which says which heads, columns and rows each rank holds.
"""

from dataclasses import dataclass, replace

from minitp.errors import InputError
from minitp.tensors import JOINED, tensor_table
from minitp.util.format import counted
from minitp.util.shares import split_in_proportion


@dataclass(frozen=True)
class TensorShard:
    """The split of one checkpoint tensor over the ranks.

    Attributes
    ----------
    name : str
        The tensor's name in the checkpoint. A part of a joined tensor has the name that it would have if it
        were stored by itself; see `tensors.JOINED`.
    shape : tuple of int
        The shape of the whole tensor, [out, in] as in the file.
    axis : int or None
        The axis that is split; None if every rank holds the whole tensor.
    ranges : tuple of (start, stop)
        The range of `axis` that each rank holds, in rank order; empty if `axis` is None.
    part_of : str or None
        The name of the joined tensor that contains this one in the file, if there is one.
    first_row : int
        The row of the joined tensor at which this one begins.
    """

    name: str
    shape: tuple
    axis: int | None
    ranges: tuple
    part_of: str | None = None
    first_row: int = 0

    def index(self, rank):
        """Return the slices of the whole tensor that a rank holds."""
        whole = [slice(0, n) for n in self.shape]
        if self.axis is not None:
            whole[self.axis] = slice(*self.ranges[rank])
        return tuple(whole)

    def shape_on(self, rank):
        """Return the shape of the part that a rank holds."""
        return tuple(s.stop - s.start for s in self.index(rank))


@dataclass(frozen=True)
class Plan:
    """The sharding plan of a model for `tp` ranks: each `*_ranges` has one (start, stop) per rank.

    Query heads, FFN columns and vocabulary rows are split evenly or in proportion to --split, and each is on
    one rank. KV heads follow the query heads: a rank holds the KV heads that its query heads read, so the
    same KV head may be on several ranks. Nine query heads and three KV heads on four ranks:

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
    experts: int = 0  # experts per layer; every rank holds its FFN columns of each expert

    def query_groups(self, rank):
        """Return the (start, stop) of the local query heads that read each KV head of this rank, in order.

        A group may be smaller than H / K: in the example above, rank 2 has [(0, 1), (1, 2)].
        """
        start, stop = self.head_ranges[rank]
        kv_start, kv_stop = self.kv_head_ranges[rank]
        per_kv_head = self.head_ranges[-1][1] // self.kv_head_ranges[-1][1]  # H // K
        return [
            (max(start, kv * per_kv_head) - start, min(stop, (kv + 1) * per_kv_head) - start)
            for kv in range(kv_start, kv_stop)
        ]


def make_plan(config, tp, shares=None):
    """Make the sharding plan of a model for `tp` ranks, in proportion to `shares` if given, else even.

    Raises
    ------
    InputError
        If there are more ranks than attention heads, or not as many shares as ranks.
    """
    if not (max_tp := config.num_attention_heads) >= tp >= 1:
        asked = f"--tp {tp}" if shares is None else f"--split with {counted(tp, 'share')}"
        raise InputError(
            f"{asked}: this model has {counted(max_tp, 'attention head')} and a rank needs at least one; "
            f"any size from 1 to {max_tp} works"
        )
    shares = shares or [1] * tp
    if len(shares) != tp:
        given, ranks = counted(len(shares), "share"), counted(tp, "rank")
        raise InputError(f"--split has {given} for {ranks}; give one share for each rank")
    sizes = config.num_attention_heads, config.intermediate_size, config.vocab_size
    return plan_of_ranges(config, *(split_in_proportion(size, shares) for size in sizes))


def plan_of_ranges(config, heads, ffn, vocab):
    """Return the Plan for given ranges of query heads, FFN columns and vocabulary rows, one per rank each."""
    per_kv_head = config.num_attention_heads // config.num_key_value_heads
    kv_heads = tuple((start // per_kv_head, (stop - 1) // per_kv_head + 1) for start, stop in heads)

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
        tensor_ranges = () if split.axis is None else ranges[split.shape[split.axis]]
        tensors[name] = TensorShard(name, shape, split.axis, tensor_ranges)
    if config.joined_projections:
        _locate_in_joined(tensors, config.num_hidden_layers)
    tp, layers, experts = len(heads), config.num_hidden_layers, config.num_local_experts
    return Plan(tp, layers, heads, kv_heads, ffn, vocab, tensors, experts)


def _locate_in_joined(tensors, layers):
    """Record where each part of a joined tensor begins in the tensor of the file."""
    for i in range(layers):
        for joined, parts in JOINED.items():
            row = 0
            for name in (f"model.layers.{i}.{part}" for part in parts):
                tensors[name] = replace(tensors[name], part_of=f"model.layers.{i}.{joined}", first_row=row)
                row += tensors[name].shape[0]
