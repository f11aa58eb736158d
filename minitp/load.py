"""Loading of a model: open its source, choose the device, and load this rank's weights."""

import os
import sys
from collections import Counter

from minitp.device import open_device
from minitp.errors import InputError
from minitp.loading.source import open_model, warn_of_unread_fields
from minitp.loading.weights import Loader, shard_nbytes
from minitp.model import Model
from minitp.shard import make_plan
from minitp.util.environment import SOCKET_VARIABLE, replica_of
from minitp.util.format import counted, size
from minitp.util.shares import MEASURED, in_tenths, shares_by_speed


def open_source(comm, options):
    """Open the ModelSource of --model on every rank, and check that all ranks have found the same model.

    Parameters
    ----------
    comm : Comm
    options : object
        An object with the options model, layers, revision, split, dtype and verbose as attributes.

    Raises
    ------
    AgreedError
        On all ranks, if one of them cannot open the source, or finds a different model under that name.
    """
    source = fingerprint = None
    wanted = options.model, comm.size, options.layers, options.revision, options.split
    with comm.agreed():  # rank 0 goes first, because it may have to download the model
        if comm.rank == 0:
            source = open_model(*wanted)
    with comm.agreed():
        if comm.rank != 0:
            source = open_model(*wanted)
        fingerprint = source.fingerprint()
    everyone = comm.all_groups
    first, *others = everyone.allgather_object(fingerprint)
    with comm.agreed():
        for rank, other in enumerate(others, start=1):
            parts = [part for part in first if first[part] != other[part]]
            if parts:
                raise InputError(
                    f"--model {source.name}: {everyone.name(rank)} found a different model than "
                    f"{everyone.name(0)} (in {' and '.join(parts)}); copy the same files to all hosts"
                )
    if everyone.rank == 0 and not os.environ.get(SOCKET_VARIABLE):  # otherwise the launcher has warned
        warn_of_unread_fields(source)
    if options.split in MEASURED and comm.size > 1:
        source = split_by_devices(comm, source, options)
    if everyone.rank == 0 and options.verbose and options.split is not None:
        print(*plan_lines(source), sep="\n", file=sys.stderr, flush=True)
    return source


def split_by_devices(comm, source, options):
    """Return the source with a plan that follows the ranks' devices; all ranks call this.

    With --split memory, a rank's share is proportional to its memory; ranks that share a memory count with
    equal parts of it. With auto, the share is proportional to the rate at which the rank's device reads
    memory (a decode pass reads all weights once), as far as the weights fit.
    """
    device = device_of(comm, source, options.dtype)
    where, room = device.weights_room()
    found = comm.all_groups.allgather_object((where, room))
    sharing = Counter(other for other, _ in found)
    rooms = least([each / sharing[other] / jobs_sharing(device) for other, each in found], comm)
    with comm.agreed():
        if min(rooms) <= 0:
            full = comm.name(rooms.index(min(rooms)))
            raise InputError(f"--split {options.split}: {full} has no free memory; give numbers")
    if options.split == "memory":
        return source.with_split(in_tenths(rooms))
    rate = None
    with comm.agreed():
        rate = device.read_rate()  # after a collective, so that all ranks read at the same time
    rates = least(comm.all_groups.allgather_object(rate), comm)
    whole = make_plan(source.config, 1)
    split = shares_by_speed(rates, rooms, shard_nbytes(whole, 0, device))
    if comm.all_groups.rank == 0 and options.verbose:
        read = ", ".join(f"{rate / 1e9:.3g}" for rate in rates)
        print(f"minitp: --split auto: the ranks read {read} GB/s", file=sys.stderr, flush=True)
    return source.with_split(split)


def least(values, comm):
    """Return the least value of each rank over all replica groups, which have the same plan."""
    return [min(values[rank :: comm.size]) for rank in range(comm.size)]


def plan_lines(source):
    """Return lines that say which part of the model each rank has, for -v."""
    plan = source.plan
    parts = plan.head_ranges, plan.kv_head_ranges, plan.ffn_ranges, plan.vocab_ranges
    lines = [f"minitp: --split {source.shares}"]
    for rank, ranges in enumerate(zip(*parts, strict=True)):
        heads, kv_heads, ffn, vocab = (f"{start}:{stop}" for start, stop in ranges)
        lines.append(
            f"minitp: rank {rank}: query heads {heads}, KV heads {kv_heads}, FFN columns {ffn}, "
            f"vocabulary {vocab}"
        )
    return lines


def device_of(comm, source, dtype="auto"):
    """Return the Device of this rank for --dtype: the GPU of `comm` if it has one, otherwise the CPU."""
    if getattr(comm, "gpu", None) is None:
        return open_device(dtype)
    from minitp.cuda.gpu import with_dtype

    return with_dtype(comm.gpu, dtype, source.config.dtype)


def jobs_sharing(device):
    """Return the number of jobs, each a replica, that share the memory of a device: one on a GPU."""
    return 1 if device.is_gpu else replica_of(os.environ)[1]


def check_room(comm, source, device):
    """Check that the weights of all ranks that share memory fit into it; all ranks call this.

    Raises
    ------
    AgreedError
        On all ranks, if the weights of some ranks do not fit.
    """
    where, room = device.weights_room()
    need = shard_nbytes(source.plan, comm.shard_rank, device)
    needs = [nbytes for other, nbytes in comm.all_groups.allgather_object((where, need)) if other == where]
    needs *= jobs_sharing(device)
    with comm.agreed():
        if sum(needs) > room:
            raise InputError(
                f"{source.name}: the weights of {counted(len(needs), 'rank')} in {device.dtype} take "
                f"{size(sum(needs))}, but {where} has only {size(room)}; `minitp plan` shows what fits"
            )


def load_model(source, comm, device, progress=lambda nbytes: None, kv_dtype="auto", path="auto"):
    """Load this rank's Model from a ModelSource.

    Parameters
    ----------
    source : ModelSource
    comm : Comm
    device : Device
    progress : callable
        A function that is called with the number of bytes of each array after it is loaded.
    kv_dtype : str
        The value of --kv-dtype.
    path : str
        explicit: the operations of `ops`; fused: the kernels of `cuda`, on a GPU; auto: fused if possible.

    Raises
    ------
    InputError
        If `path` is fused and the device or the model does not support it.
    """
    loader_args = source.plan, comm.shard_rank, source.tensors, device, progress
    if not device.is_gpu:
        if path == "fused":
            raise InputError("--path fused needs a GPU; omit it, or add --device cuda")
        return Model(source.config, source.plan, Loader(*loader_args).load(), comm, device, kv_dtype)
    from minitp.cuda.fused import FusedModel, unfit
    from minitp.cuda.loader import GpuLoader

    reason = unfit(source.config, source.plan, device, kv_dtype)
    if path == "fused" and reason is not None:
        raise InputError(f"--path fused: {reason}; use --path explicit")
    kind = Model if path == "explicit" or reason is not None else FusedModel
    return kind(source.config, source.plan, GpuLoader(*loader_args).load(), comm, device, kv_dtype)
