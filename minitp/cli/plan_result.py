"""The result of `minitp plan` as a dict for JSON, which `plan_text` formats."""

from dataclasses import asdict, replace
from math import prod

from minitp.bench.this_machine import measure_cpu
from minitp.errors import InputError, shown
from minitp.estimate.estimate import Spread, estimate, smallest_tp
from minitp.estimate.hardware import GPUS, GPUS_PER_NODE, NETWORK, mixed
from minitp.estimate.kernels import WORDS
from minitp.estimate.ranks import choose_split, rank_estimates
from minitp.estimate.work import ITEM_BYTES, cache_bytes
from minitp.launch.run import ranks_for, ranks_of_split
from minitp.shard import make_plan
from minitp.util.environment import ranks_wanted
from minitp.util.format import counted, size
from minitp.util.shares import MEASURED, shares_in

ONE_NODE, MORE_NODES = (1, 2, 4, 8), (16, 32)  # numbers of ranks that are always shown


def predict(args, config, workload):
    """Return the memory and the speed to expect for a Workload and a model's Config."""
    names = args.gpu.split(",")
    known = [GPUS[name] for name in names if name != "cpu"]
    dtype = choose_dtype(args.dtype, names, config)
    gpus = mixed(known) if len(known) > 1 else next(iter(known), None)
    asked = read_spread(args, config, gpus, dtype, workload)
    make_plan(config, asked.tp, shares_in(asked.split))  # raises InputError for more ranks than heads
    hardware = machine = gpus or measure_cpu(config, dtype)
    if gpus is None and args.replicas > 1:
        hardware = machine.divided(args.replicas)
    spreads, left_out = choose_spreads(config, hardware, asked)
    alike = spreads[-1].split is None and not hardware.ranks
    result = {
        "model": args.model,
        **model_facts(config, dtype),
        "hardware": hardware_facts(machine, dtype),
        "context_tokens": workload.context,
        "prompt_tokens": workload.prompt,
        "batch": workload.batch,
        "tp": asked.tp,
        "nodes": asked.nodes,
        "split": asked.split,
        "replicas": args.replicas,
        "smallest_tp_that_fits": smallest_tp(config, hardware, dtype, workload) if alike else None,
        "estimates": [asdict(estimate(config, hardware, spread, dtype, workload)) for spread in spreads],
        "ranks": [] if alike else rank_estimates(config, hardware, asked, dtype, workload),
    }
    result["all_replicas"] = all_replicas(result) if args.replicas > 1 else None
    result["notes"] = notes(config, hardware, result, left_out)
    return result


def is_asked(result, row):
    """Return whether the user chose the distribution of a row."""
    return all(row[key] == result[key] for key in ("tp", "nodes", "split"))


def all_replicas(result):
    """Return the ranks, the sequences and the speed of all replicas, by the row that the user chose."""
    row = next(row for row in result["estimates"] if is_asked(result, row))
    if not row["fits"]:
        return None
    count = result["replicas"]
    speeds = {
        f"{kind}_tokens_per_s": count * row[f"batch_{kind}_tokens_per_s"] for kind in ("limit", "expected")
    }
    return {"ranks": count * result["tp"], "sequences": count * row["batch"], **speeds}


def read_spread(args, config, gpus, dtype, workload):
    """Return the Spread that --tp, --split, --nodes and the GPUs ask for; `gpus` is None for --gpu cpu."""
    split = None if args.split in MEASURED else args.split  # ranks on equal hardware have equal shares
    shares = ranks_of_split(args.tp, split)
    if gpus is None:
        if args.nodes is not None:
            raise InputError(f"--nodes {args.nodes}: --gpu cpu is this machine only; choose a GPU")
        return Spread(shares or ranks_for(config, args.tp, "cpu", args.replicas), 1, split)
    if gpus.ranks:
        tp = len(gpus.ranks)
        if (shares or tp) != tp or (args.tp != "auto" and ranks_wanted(args.tp) != tp):
            asked = f"--tp {args.tp}" if shares is None else f"--split {shown(split)}"
            raise InputError(f"{asked}, but --gpu has {counted(tp, 'GPU')}; give a GPU for each rank")
        if args.split in MEASURED:
            split = choose_split(config, gpus, dtype, args.split)
    elif shares is not None:
        tp = shares
    elif args.tp == "auto":
        heads = config.num_attention_heads
        fits = smallest_tp(config, gpus, dtype, workload) or min(GPUS_PER_NODE, heads)
        tp = max(fits, min(args.nodes or 1, heads))
    else:
        tp = ranks_wanted(args.tp)
    nodes = -(-tp // GPUS_PER_NODE) if args.nodes is None else args.nodes
    if not 1 <= nodes <= tp:
        raise InputError(f"--nodes {nodes}: expected 1 to {tp} for --tp {tp}")
    return Spread(tp, nodes, split)


def choose_dtype(dtype, names, config):
    """Return the dtype of the weights; auto is float32 on CPUs, on GPUs the checkpoint's 16-bit dtype."""
    if dtype != "auto":
        return dtype
    if names == ["cpu"]:
        return "float32"
    return config.dtype if ITEM_BYTES[config.dtype] == 2 else "bfloat16"


def choose_spreads(config, hardware, asked):
    """Return the Spreads to show, and the numbers of ranks that exceed the attention heads.

    With unequal shares or GPUs, only those ranks are shown, with equal shares for comparison.
    """
    if asked.split is not None or hardware.ranks:
        return list(dict.fromkeys([replace(asked, split=None), asked])), []
    usual = [Spread(tp, 1) for tp in ONE_NODE]
    if hardware.cores is None:
        usual += [Spread(tp, tp // GPUS_PER_NODE) for tp in MORE_NODES]
    shown = {spread for spread in usual if spread.tp <= config.num_attention_heads} | {asked}
    left_out = [spread.tp for spread in usual if spread.tp > config.num_attention_heads]
    return sorted(shown, key=lambda spread: (spread.tp, spread.nodes)), left_out


def model_facts(config, dtype):
    """Return the facts of the unsharded model."""
    whole = make_plan(config, 1)
    parameters = sum(prod(tensor.shape) for tensor in whole.tensors.values())
    return {
        "layers": config.num_hidden_layers,
        "parameters": parameters,
        "dtype": dtype,
        "weight_bytes": parameters * ITEM_BYTES[dtype],
        "kv_cache_bytes_per_token": cache_bytes(config, whole, 0, dtype),
        "model_context_tokens": config.max_position_embeddings,
        "sliding_window_tokens": config.sliding_window,
    }


def hardware_facts(hardware, dtype):
    """Return the figures of the hardware that the estimates use."""
    return {
        "name": hardware.name,
        "title": hardware.title,
        "cores": hardware.cores,
        "memory_bytes": hardware.memory_bytes,
        "reserve_bytes_per_rank": hardware.reserve_bytes,
        "memory_bytes_per_s": hardware.memory_bytes_per_s,
        "flops_per_s": hardware.flops_per_s[dtype],
        "link": asdict(hardware.link),
        "network": None if hardware.cores is not None else asdict(NETWORK),
        "efficiency": asdict(hardware.efficiency),
        "measured_with_minitp": hardware.own_source or None,
        "published": hardware.expected_source or None,
    }


def notes(config, hardware, result, left_out):
    """Return notes on what the figures mean and assume."""
    on_cpu, found = hardware.cores is not None, []
    if result["replicas"] > 1:
        part = f", on 1/{result['replicas']} of the machine" if on_cpu else ", on its own GPUs"
        found.append(f"Each row is one replica{part}.")
    if left_out:
        sizes = " and ".join(map(str, left_out)) if len(left_out) < 3 else f"{left_out[0]} and more"
        heads = counted(config.num_attention_heads, "attention head")
        found.append(f"TP={sizes} left out: the model has only {heads}.")
    held = size(hardware.reserve_bytes)
    if on_cpu:
        found.append(f"Memory: all ranks share the machine's memory; {held} per rank is reserved for Python.")
    else:
        found.append(
            f"Memory: the datasheet's figure, of which {held} is reserved for CUDA, NCCL and activations."
        )
    windowed = sum(window is not None for window in config.windows)
    if windowed:
        some = f" in {windowed} of {len(config.windows)} layers" if windowed < len(config.windows) else ""
        found.append(
            f"The cache keeps every position, and decoding reads the last {config.sliding_window}{some}."
        )
    prompt = counted(result["prompt_tokens"], "token")
    found.append(
        f"tokens/s: with {prompt} in the cache of each sequence; in collectives: their share of the time per "
        "token of one sequence."
    )
    limit = f"limit: {hardware.limit_source}"
    limit += "; for all, " if ";" in hardware.limit_source else ", and "
    if on_cpu:
        found.append(f"{limit}the latency of the collectives. Ranks share cores if there are too few.")
    else:
        link = f"{hardware.link.name}; between nodes {NETWORK.name}"
        found.append(f"{limit}the latency of NCCL's collectives over {link}.")
    found += sources(hardware, result)
    found += [
        f"config.json has a field {name!r} unknown to minitp; if it affects shapes, the plan is wrong."
        for name in config.unread
    ]
    return found


def sources(hardware, result):
    """Return the origins of the expected figures: measured with minitp, then published by others."""
    found = []
    if hardware.own_source:
        found.append(f"expected, measured with minitp: {hardware.own_source}.")
    row = next(row for row in result["estimates"] if is_asked(result, row))
    if row["decode_us_per_layer"]:
        times = ", ".join(f"{WORDS[kind]} {us:.1f}" for kind, us in row["decode_us_per_layer"].items() if us)
        found.append(f"expected kernel times, in µs per layer of one sequence at TP={row['tp']}: {times}.")
    if hardware.expected_source:
        found.append(f"expected, published by others: {hardware.expected_source}.")
    return found
