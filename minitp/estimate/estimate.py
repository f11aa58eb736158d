"""Estimates of memory and speed, computed from a model's config, its sharding plan and the hardware.

The time of a forward pass is that of its slowest rank, plus the collectives. A rank's time is the longer of
reading the bytes and doing the arithmetic, first for the projections, then for attention. (Williams et al.,
Roofline, 2009; for transformers Pope et al., Efficiently Scaling Transformer Inference, 2022.) The same
formula gives the limit and the expected value, with different efficiencies.
"""

import math
from dataclasses import dataclass

from minitp.estimate.hardware import LIMIT, NETWORK
from minitp.estimate.kernels import decode_seconds, layer_seconds
from minitp.estimate.work import ITEM_BYTES, Pass, cache_bytes, rank_work, weight_bytes
from minitp.shard import make_plan
from minitp.util.shares import shares_in

LOGIT_BYTES = 4  # logits are float32, whatever the dtype
PROMPT_PASS = 2048  # tokens of a prompt in one pass on a GPU


@dataclass(frozen=True)
class Spread:
    """A distribution of `tp` ranks over `nodes`, as even as possible, with the ranks' shares in `split`."""

    tp: int
    nodes: int
    split: str | None = None  # None for equal shares

    @property
    def per_node(self):
        """Ranks on the fullest node."""
        return -(-self.tp // self.nodes)


@dataclass(frozen=True)
class Workload:
    """A load to plan for: the context and prompt of each sequence, and the batch (None for the largest)."""

    context: int
    prompt: int
    batch: int | None = None


@dataclass(frozen=True)
class Estimate:
    """An estimate for one distribution of a model over ranks. Times and speeds are None if it does not fit.

    Attributes
    ----------
    weight_bytes_per_rank, kv_cache_bytes_per_token_per_rank : int
        Bytes on the rank that has the most.
    longest_context_tokens : int
        Longest context of a single sequence; `longest_context_limited_by` is "memory" or "model".
    largest_batch : int
        Number of sequences that fit, each as long as the workload's context.
    fits : bool
        Whether the weights and the workload's batch (one sequence by default) fit.
    batch : int
        The workload's batch, or the largest that fits.
    collectives_per_token : int
        Number of collectives in one pass.
    prefill_*_s, decode_*_tokens_per_s : float or None
        Time of one sequence's prompt, and speed of the tokens after it.
    decode_us_per_layer : dict or None
        Microseconds of each kind of kernel in a layer of one sequence's decode pass, on the slowest rank;
        None if minitp has not been measured on the hardware.
    split : str or None
        The ranks' shares of the model, as in "3,1"; None for equal shares.
    batch_*_tokens_per_s : float or None
        Speed of `batch` sequences together.
    collective_share_* : float or None
        Collectives' share of the time of one sequence's decode pass.
    """

    tp: int
    nodes: int
    weight_bytes_per_rank: int
    kv_cache_bytes_per_token_per_rank: int
    longest_context_tokens: int
    longest_context_limited_by: str
    largest_batch: int
    fits: bool
    batch: int
    collectives_per_token: int
    prefill_limit_s: float | None = None
    prefill_expected_s: float | None = None
    decode_limit_tokens_per_s: float | None = None
    decode_expected_tokens_per_s: float | None = None
    batch_limit_tokens_per_s: float | None = None
    batch_expected_tokens_per_s: float | None = None
    collective_share_limit: float | None = None
    collective_share_expected: float | None = None
    split: str | None = None
    decode_us_per_layer: dict | None = None


def collectives(config, tp):
    """Return the number of collectives in a pass.

    There are all-reduces of the embeddings and of two sums per layer, and an all-gather of the logits.
    """
    return 2 * config.num_hidden_layers + 2 if tp > 1 else 0


def cache_room(config, plan, hardware, dtype):
    """Return the tokens whose keys and values fit next to the weights, or 0 if not even the weights fit.

    The tokens are those of all sequences together.
    """
    ranks = range(plan.tp)
    weights = [weight_bytes(plan, rank, dtype) + hardware.of(rank).reserve_bytes for rank in ranks]
    rooms = [hardware.of(rank).memory_bytes for rank in ranks]
    caches = [cache_bytes(config, plan, rank, dtype) for rank in ranks]
    if hardware.cores is not None:  # the ranks share one memory
        weights, caches, rooms = [sum(weights)], [sum(caches)], rooms[:1]
    sizes = zip(rooms, weights, caches, strict=True)
    return max(0, int(min((room - weight) // cache for room, weight, cache in sizes)))


def compute_seconds(config, plan, hardware, work, dtype, efficiency):
    """Return the time of a pass without its collectives, on the slowest rank."""
    return max(rank_seconds(config, plan, hardware, rank, work, dtype, efficiency) for rank in range(plan.tp))


def rank_seconds(config, plan, hardware, rank, work, dtype, efficiency):
    """Return the time of a pass on one rank, without its collectives.

    If `efficiency` is that of `hardware`, the rank's own GPU has its own.
    """
    machine = hardware.of(rank)
    efficiency = machine.efficiency if efficiency is hardware.efficiency else efficiency
    bytes_per_s, flops_per_s = rates(machine, plan.tp, dtype, efficiency)
    combine = sum if efficiency.packs and work.sequences * work.tokens > 1 else max
    parts = rank_work(config, plan, rank, work, dtype)
    products = sum(combine((nbytes / bytes_per_s, flops / flops_per_s)) for nbytes, flops in parts)
    layer_s = efficiency.layer_s
    if efficiency.kernels is not None and work.tokens == 1:
        layer_s = 0.0  # the kernels' times contain it
        products = max(products, decode_seconds(config, plan, rank, work, dtype, efficiency.kernels))
    small = config.num_hidden_layers * (layer_s + work.sequences * efficiency.sequence_s)
    turns = 1 if machine.cores is None else -(-plan.tp // machine.cores)  # ranks that take turns on a core
    return max(products + turns * small, host_seconds(config, work, efficiency))


def host_seconds(config, work, efficiency):
    """Return the time that the host takes to launch the passes of a prompt; decode passes are graphs."""
    passes = 0 if work.tokens == 1 else -(-work.tokens // PROMPT_PASS)
    return passes * config.num_hidden_layers * efficiency.host_s


def rates(hardware, tp, dtype, efficiency):
    """Return (bytes, FLOPs) per second for one of `tp` ranks."""
    bytes_per_s = hardware.memory_bytes_per_s * efficiency.memory
    flops_per_s = hardware.flops_per_s[dtype] * efficiency.matrix
    if hardware.cores is None:
        return bytes_per_s, flops_per_s
    if tp < hardware.cores:
        bytes_per_s *= efficiency.threads
    return bytes_per_s / tp, flops_per_s / tp * cores_used(tp, hardware.cores) / hardware.cores


def cores_used(tp, cores):
    """Return the number of cores in use, if all ranks have the same number of BLAS threads."""
    return tp * (cores // tp) if tp < cores else cores


def all_reduce_seconds(hardware, spread, nbytes, efficiency):
    """Return the time of an all-reduce of `nbytes`.

    For an all-gather, which moves half as much, pass half of the bytes gathered. On GPUs the all-reduce is
    first within each node, then between nodes: the latency is that of NCCL's tree, the transfer that of
    rings. On a CPU each rank writes its array, reads all of them, and writes the sum
    (`comm.Comm.all_reduce`).
    """
    per_node, nodes, link = spread.per_node, spread.nodes, hardware.link
    latency = link.start_s + 2 * (per_node - 1) * link.hop_s
    latency += 2 * math.ceil(math.log2(nodes)) * NETWORK.hop_s
    if hardware.cores is not None:
        transfer = spread.tp * (spread.tp + 2) * nbytes / link.bytes_per_s
    else:
        transfer = ring_bytes(per_node, nbytes) / link.bytes_per_s
        transfer += ring_bytes(nodes, nbytes / per_node) / NETWORK.bytes_per_s
    return latency * efficiency.latency + transfer / efficiency.link


def ring_bytes(ranks, nbytes):
    """Return the bytes each rank sends in a ring all-reduce (Patarasuk and Yuan, 2009)."""
    return 2 * (ranks - 1) / ranks * nbytes


def collective_seconds(config, hardware, spread, work, dtype, efficiency):
    """Return the time of all collectives of a pass."""
    count = collectives(config, spread.tp)
    if not count:
        return 0.0
    stream = work.sequences * work.tokens * config.hidden_size * ITEM_BYTES[dtype]
    logits = work.sequences * config.vocab_size * LOGIT_BYTES
    return (count - 1) * all_reduce_seconds(hardware, spread, stream, efficiency) + all_reduce_seconds(
        hardware, spread, logits / 2, efficiency
    )


def estimate(config, hardware, spread, dtype, workload):
    """Estimate a model's memory and speed over `spread`; return an Estimate.

    Raises
    ------
    InputError
        if the model has fewer attention heads than ranks.
    """
    plan = make_plan(config, spread.tp, shares_in(spread.split))
    ranks = range(spread.tp)
    room = cache_room(config, plan, hardware, dtype)
    model = config.max_position_embeddings
    largest = room // workload.context
    batch = largest if workload.batch is None else workload.batch
    fits = largest >= (workload.batch or 1)
    return Estimate(
        tp=spread.tp,
        nodes=spread.nodes,
        split=spread.split,
        weight_bytes_per_rank=max(weight_bytes(plan, rank, dtype) for rank in ranks),
        kv_cache_bytes_per_token_per_rank=max(cache_bytes(config, plan, rank, dtype) for rank in ranks),
        longest_context_tokens=min(room, model),
        longest_context_limited_by="memory" if room < model else "model",
        largest_batch=largest,
        fits=fits,
        batch=batch,
        collectives_per_token=collectives(config, spread.tp),
        **(speeds(config, plan, hardware, spread, dtype, workload, batch) if fits else {}),
    )


def speeds(config, plan, hardware, spread, dtype, workload, batch):
    """Return the fields of an Estimate that are times and speeds."""
    found = {}
    for kind, efficiency in (("limit", LIMIT), ("expected", hardware.efficiency)):

        def seconds(work, efficiency=efficiency):
            comm = collective_seconds(config, hardware, spread, work, dtype, efficiency)
            return compute_seconds(config, plan, hardware, work, dtype, efficiency) + comm, comm

        prefill, _ = seconds(Pass(1, workload.prompt, 0))
        decode, comm = seconds(Pass(1, 1, workload.prompt))
        batched, _ = seconds(Pass(batch, 1, workload.prompt))
        found[f"prefill_{kind}_s"] = prefill
        found[f"decode_{kind}_tokens_per_s"] = 1 / decode
        found[f"batch_{kind}_tokens_per_s"] = batch / batched
        found[f"collective_share_{kind}"] = comm / decode
    found["decode_us_per_layer"] = us_per_layer(config, plan, hardware, Pass(1, 1, workload.prompt), dtype)
    return found


def us_per_layer(config, plan, hardware, work, dtype):
    """Return the microseconds of the kernels in a layer on the slowest rank, or None if not measured."""
    found = []
    for rank in range(plan.tp):
        kernels = hardware.of(rank).efficiency.kernels
        if kernels is None:
            return None
        found.append(layer_seconds(config, plan, rank, work, dtype, kernels))
    slowest = max(found, key=lambda one: sum(one.values()))
    return {name: 1e6 * seconds for name, seconds in slowest.items()}


def smallest_tp(config, hardware, dtype, workload):
    """Return the smallest number of ranks on which the workload fits, or None."""
    sequences = workload.batch or 1
    for tp in range(1, config.num_attention_heads + 1):
        if cache_room(config, make_plan(config, tp), hardware, dtype) >= sequences * workload.context:
            return tp
    return None
