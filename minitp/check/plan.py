"""The check of a sharding plan, derived from config.json alone."""

import re

from minitp.util.format import counted

# Tensor name -> the axis in the file that is split, and the units in which it is split: heads, key/value
# heads, FFN columns or vocabulary rows.
SPLIT = {
    "block_sparse_moe.experts.*.w1.weight": (0, "ffn"),
    "block_sparse_moe.experts.*.w2.weight": (1, "ffn"),
    "block_sparse_moe.experts.*.w3.weight": (0, "ffn"),
    "mlp.experts.*.gate_proj.weight": (0, "ffn"),
    "mlp.experts.*.up_proj.weight": (0, "ffn"),
    "mlp.experts.*.down_proj.weight": (1, "ffn"),
    "self_attn.q_proj.weight": (0, "heads"),
    "self_attn.k_proj.weight": (0, "kv_heads"),
    "self_attn.v_proj.weight": (0, "kv_heads"),
    "self_attn.q_proj.bias": (0, "heads"),
    "self_attn.k_proj.bias": (0, "kv_heads"),
    "self_attn.v_proj.bias": (0, "kv_heads"),
    "self_attn.o_proj.weight": (1, "heads"),
    "mlp.gate_proj.weight": (0, "ffn"),
    "mlp.up_proj.weight": (0, "ffn"),
    "mlp.gate_proj.bias": (0, "ffn"),
    "mlp.up_proj.bias": (0, "ffn"),
    "mlp.down_proj.weight": (1, "ffn"),
    "model.embed_tokens.weight": (0, "vocab"),
    "lm_head.weight": (0, "vocab"),
}


def plan_problems(oracle, plan, split=None):
    """Return the faults of a plan as a list of (rank or "all", description).

    Parameters
    ----------
    oracle : Oracle
        An oracle that has read the same config.json with its own code.
    plan : Plan
    split : str or None
        The value of --split that the plan should follow, as in "3,1"; None if that is not to be checked.
    """
    problems = []
    runs = {
        "heads": (oracle.heads, plan.head_ranges),
        "ffn": (oracle.intermediate_size, plan.ffn_ranges),
        "vocab": (oracle.vocab_size, plan.vocab_ranges),
    }
    by_rank = {what: ranges for what, (_, ranges) in runs.items()} | {"kv_heads": plan.kv_head_ranges}
    for what, ranges in by_rank.items():
        if len(ranges) != plan.tp:
            found = f"{counted(len(ranges), 'range')} for {counted(plan.tp, 'rank')}"
            problems.append(("all", f"{what}: {found}"))
    if problems:
        return problems  # the other checks need the ranges of every rank
    for what, (count, ranges) in runs.items():
        problems += _not_covered_once(what, count, ranges)
        if split is not None:
            problems += _not_in_proportion(what, count, ranges, list(map(float, split.split(","))))
    problems += _wrong_kv_heads(oracle, plan)
    problems += _wrong_tensors(oracle, plan)
    return problems


def _not_covered_once(what, count, ranges):
    """Return a problem for each range that overlaps the one before it or leaves a gap."""
    problems, expected = [], 0
    for rank, (start, stop) in enumerate(ranges):
        if start != expected or stop < start:
            problems.append((rank, f"{what} {start} to {stop}, expected to begin at {expected}"))
        expected = stop
    if expected != count:
        problems.append((len(ranges) - 1, f"{what} end at {expected}, expected {count}"))
    return problems


def _not_in_proportion(what, count, ranges, shares):
    """Return a problem for each rank whose range differs from its share by a whole unit or more.

    A rank whose share is less than one unit has one unit, which the others then lack.
    """
    exact = [count * share / sum(shares) for share in shares]
    most = 1 + sum(size < 1 for size in exact)
    return [
        (rank, f"{what} {start} to {stop} are {stop - start} of {count}, expected {size:.1f} by its share")
        for rank, ((start, stop), size) in enumerate(zip(ranges, exact, strict=True))
        if abs(stop - start - size) >= most
    ]


def _wrong_kv_heads(oracle, plan):
    """Return a problem for each query head without its KV head, h // (H / K), and for unused KV heads."""
    problems = []
    group = oracle.heads // oracle.kv_heads
    for rank in range(plan.tp):
        start, stop = plan.head_ranges[rank]
        kv_start, kv_stop = plan.kv_head_ranges[rank]
        needed = {head // group for head in range(start, stop)}
        if needed != set(range(kv_start, kv_stop)):
            problems.append(
                (rank, f"KV heads {kv_start} to {kv_stop}, but its query heads read {sorted(needed)}")
            )
            continue
        read = {head: [] for head in range(start, stop)}  # KV heads of each query head
        for kv, (first, last) in enumerate(plan.query_groups(rank), kv_start):
            for head in range(start + first, start + last):
                read.setdefault(head, []).append(kv)
        for head, kvs in read.items():
            if not start <= head < stop:
                problems.append((rank, f"a group has query head {head}, but the rank has {start} to {stop}"))
            elif kvs != [head // group]:
                found = " and ".join(map(str, kvs)) or "none"
                problems.append((rank, f"query head {head} reads KV head {found}, expected {head // group}"))
    return problems


def _wrong_tensors(oracle, plan):
    """Return a problem for each tensor that is not split like its heads, columns or rows."""
    d = oracle.head_dim

    def times_d(ranges):
        return tuple((start * d, stop * d) for start, stop in ranges)

    ranges = {
        "heads": times_d(plan.head_ranges),
        "kv_heads": times_d(plan.kv_head_ranges),
        "ffn": tuple(plan.ffn_ranges),
        "vocab": tuple(plan.vocab_ranges),
    }
    shapes = oracle.tensor_shapes()
    problems = [("all", f"tensor {name} is not in the plan") for name in shapes if name not in plan.tensors]
    for name, shard in plan.tensors.items():
        if shapes.get(name) != tuple(shard.shape):
            problems.append(("all", f"tensor {name}: shape {shard.shape}, expected {shapes.get(name)}"))
            continue
        part = name.split(".", 3)[3] if name.startswith("model.layers.") else name
        part = re.sub(r"\.experts\.\d+\.", ".experts.*.", part)
        axis, what = SPLIT.get(part, (None, None))
        if shard.axis != axis:
            problems.append(("all", f"tensor {name} is split along axis {shard.axis}, expected {axis}"))
        elif axis is not None and len(shard.ranges) != plan.tp:
            found = f"{counted(len(shard.ranges), 'range')} for {counted(plan.tp, 'rank')}"
            problems.append(("all", f"tensor {name}: {found}"))
        elif axis is not None:
            for rank, (found, right) in enumerate(zip(shard.ranges, ranges[what], strict=True)):
                if tuple(found) != right:
                    problems.append((rank, f"tensor {name}: {found[0]} to {found[1]}, expected {right}"))
    return problems
