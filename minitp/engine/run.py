"""Run a rank of `LLM`, `minitp chat` or `minitp serve`: load the model, then serve requests."""

import os
from collections import Counter

from minitp.engine.engine import Engine
from minitp.engine.service import RankTimes, report_times, serve
from minitp.launch.transport import tell_choice, transport_of
from minitp.load import check_room, device_of, load_model, open_source
from minitp.loading.weights import shard_nbytes
from minitp.request import Request, context_length
from minitp.util.environment import replica_of

PROGRESS_MESSAGES = 100  # maximum number of messages while loading


def run_engine(options, comm, caller):
    """Load the model, then serve the caller of rank 0 until it sends "close"; all ranks call this.

    Parameters
    ----------
    options : EngineOptions
    comm : Comm
    caller : object
        The object that rank 0 serves; see `service.serve`.

    Returns
    -------
    int
        The exit code.
    """
    source = open_source(comm, options)
    with comm.agreed():
        context_length(source.config, options.max_context)
    device = device_of(comm, source, options.dtype)
    check_room(comm, source, device)
    with comm.agreed():
        progress = (lambda nbytes: None) if comm.rank else LoadProgress(source, comm, device, caller)
        model = load_model(source, comm, device, progress, options.kv_dtype)
    model.connect()
    tell_choice(model.comm, options.verbose)
    fit = blocks_that_fit(comm, device, model.new_pool(1, options.block_size).nbytes)
    num_blocks = blocks_needed(options, source.config, fit)
    context = min(context_length(source.config, options.max_context), num_blocks * options.block_size)
    with comm.agreed():
        sizes = options.block_size, options.max_tokens_per_step, options.max_sequences
        engine = Engine(model, num_blocks, *sizes)
        tokenizer = source.tokenizer() if comm.rank == 0 else None
        eos_token_ids = source.eos_token_ids(tokenizer)
    times = RankTimes(comm_seconds=None if device.is_gpu else 0.0)
    report_times(comm, caller, times)  # so that the caller has times as soon as the ranks are ready
    parts = comm.allgather_object(describe_rank(engine))
    if comm.rank == 0:
        description = describe(options, engine, source.shares, context, parts)
        caller.send({"ready": description, "load": engine.scheduler.load()})

    def make_request(prompt_ids, params):
        return Request(params, eos_token_ids, prompt_ids, context, tokenizer)

    serve(engine, caller, make_request, times)
    return 0


def blocks_that_fit(comm, device, nbytes):
    """Return the number of blocks that fit on every rank, whose own block has `nbytes`; all ranks call this.

    All ranks have the same number of blocks. Ranks that share a memory divide it by the sizes of their
    blocks, which differ with the number of KV heads.
    """
    where, _ = device.weights_room()
    rooms, blocks = Counter(), Counter()
    sharing = comm.all_groups.size * replica_of(os.environ)[1]  # the ranks of all replicas
    for memory, room, size in comm.allgather_object((where, device.cache_room(sharing), nbytes)):
        rooms[memory] += room
        blocks[memory] += size
    return min(rooms[memory] // blocks[memory] for memory in rooms)


def blocks_needed(options, config, fit):
    """Return the number of blocks in every rank's pool.

    With `cache_tokens` the pool has room for that many tokens. Otherwise it has room for `max_sequences`
    sequences of the maximum length, but at most `fit` blocks.
    """
    if options.cache_tokens is not None:
        return options.cache_tokens // options.block_size
    longest = -(-context_length(config, options.max_context) // options.block_size)
    return max(1, min(longest * options.max_sequences, fit))


class LoadProgress:
    """A counter of the bytes loaded on rank 0, which it reports to the caller."""

    def __init__(self, source, comm, device, caller):
        self.total, self.caller = shard_nbytes(source.plan, comm.shard_rank, device), caller
        self.done = self.reported = 0

    def __call__(self, nbytes):
        self.done += nbytes
        if self.done - self.reported >= self.total / PROGRESS_MESSAGES:
            self.reported = self.done
            self.caller.send({"loading": self.done, "of": self.total})


def describe_rank(engine):
    """Return this rank's part of the model: ranges [start, stop] of heads, columns and rows, and bytes."""
    model = engine.model
    rank, plan = model.comm.rank, model.plan
    return {
        "rank": rank,
        "query_heads": list(plan.head_ranges[rank]),
        "kv_heads": list(plan.kv_head_ranges[rank]),
        "ffn_columns": list(plan.ffn_ranges[rank]),
        "vocabulary": list(plan.vocab_ranges[rank]),
        "weight_bytes": model.weights.nbytes,
        "cache_bytes": engine.pool.nbytes,
    }


def describe(options, engine, shares, context, parts):
    """Return the settings and sizes of the ranks, for the caller.

    `shares` is the value of --split that gives the same plan; `parts` has describe_rank of each rank.
    """
    return {
        "tp": engine.model.comm.size,
        "split": shares,
        "replicas": options.replicas,
        "dtype": engine.model.device.dtype.name,
        "kv_dtype": options.kv_dtype,
        "transport": transport_of(engine.model.comm),
        "context": context,
        "blocks": engine.scheduler.allocator.num_blocks,
        "block_size": options.block_size,
        "max_sequences": options.max_sequences,
        "max_tokens_per_step": options.max_tokens_per_step,
        "weight_bytes_per_rank": engine.model.weights.nbytes,
        "cache_bytes_per_rank": engine.pool.nbytes,
        "ranks": parts,
    }
