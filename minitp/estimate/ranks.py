"""The ranks one by one: their shares of the model, in proportion to their hardware, and their times."""

from minitp.estimate.estimate import rank_seconds
from minitp.estimate.hardware import LIMIT
from minitp.estimate.work import Pass, cache_bytes, weight_bytes
from minitp.shard import make_plan
from minitp.util.shares import in_tenths, shares_by_speed, shares_in


def choose_split(config, hardware, dtype, how):
    """Return the shares for --split auto or memory, as the ranks would choose them; None if they are equal.

    The bandwidth is that of the Hardware, with its efficiency; see `load.split_by_devices`.
    """
    gpus = hardware.ranks
    rooms = [gpu.memory_bytes - gpu.reserve_bytes for gpu in gpus]
    if how == "memory":
        split = in_tenths(rooms)
    else:
        rates = [gpu.memory_bytes_per_s * gpu.efficiency.memory for gpu in gpus]
        split = shares_by_speed(rates, rooms, weight_bytes(make_plan(config, 1), 0, dtype))
    return split if len(set(split.split(","))) > 1 else None


def rank_estimates(config, hardware, spread, dtype, workload):
    """Return a dict for each rank: its part of the model, its memory, and its time for a token.

    The time is that of one sequence's decode pass without the collectives, in which fast ranks wait for the
    slowest.
    """
    plan = make_plan(config, spread.tp, shares_in(spread.split))
    work, found = Pass(1, 1, workload.prompt), []
    for rank in range(spread.tp):
        gpu = hardware.of(rank)
        seconds = [
            rank_seconds(config, plan, hardware, rank, work, dtype, efficiency)
            for efficiency in (LIMIT, hardware.efficiency)
        ]
        found.append(
            {
                "rank": rank,
                "hardware": gpu.name,
                "query_heads": plan.head_ranges[rank],
                "kv_heads": plan.kv_head_ranges[rank],
                "ffn_columns": plan.ffn_ranges[rank],
                "vocabulary": plan.vocab_ranges[rank],
                "memory_bytes": gpu.memory_bytes,
                "weight_bytes": weight_bytes(plan, rank, dtype),
                "kv_cache_bytes_per_token": cache_bytes(config, plan, rank, dtype),
                "decode_limit_s": seconds[0],
                "decode_expected_s": seconds[1],
            }
        )
    return found
