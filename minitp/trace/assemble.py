"""The whole array of a step, assembled from the ranks' parts."""

import numpy as np

from minitp.trace.names import WEIGHTS, Kind, kinds, split_name


def assemble(kind, parts):
    """Return the whole array of a step, from the ranks' parts in rank order.

    If several ranks hold a KV head, the first rank's copy is used. Partial sums are added in float64.
    """
    if kind.kind == "replicated":
        return parts[0]
    if kind.kind == "partial":
        return sum(part.astype(np.float64) for part in parts).astype(parts[0].dtype)
    shape = list(parts[0].shape)
    shape[kind.axis] = kind.ranges[-1][1]
    whole = np.empty(shape, dtype=parts[0].dtype)  # shape as in the tables of `names`
    for part, (start, stop) in reversed(list(zip(parts, kind.ranges, strict=True))):
        whole[(slice(None),) * kind.axis + (slice(start, stop),)] = part
    return whole


def step_kinds(source):
    """Return a function from a step's full name to its Kind."""
    by_step = kinds(source.plan, source.config.head_dim)

    def kind_of(name):
        if name.startswith(WEIGHTS):
            shard = source.plan.tensors[name.removeprefix(WEIGHTS)]
            return Kind("replicated") if shard.axis is None else Kind("sharded", shard.axis, shard.ranges)
        return by_step[split_name(name)[2]]

    return kind_of
