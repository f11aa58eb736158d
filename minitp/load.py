"""From a model's name to this rank's Model: the source, the device, the weights, the path."""

import os

from minitp.device import open_device
from minitp.errors import InputError
from minitp.loading.source import open_model, warn_of_unread_fields
from minitp.loading.weights import Loader, shard_nbytes
from minitp.model import Model
from minitp.util.environment import SOCKET_VARIABLE
from minitp.util.format import counted, size


def open_source(comm, name, layers=None):
    """The ModelSource of a name, on every rank, and the same one; all ranks call it.

    Raises
    ------
    AgreedError
        on all ranks, if one of them cannot open it, or finds another model under that name.
    """
    source = fingerprint = None
    with comm.agreed():  # rank 0 first, for it may have to download
        if comm.rank == 0:
            source = open_model(name, comm.size, layers)
    with comm.agreed():
        if comm.rank != 0:
            source = open_model(name, comm.size, layers)
        fingerprint = source.fingerprint()
    first, *others = comm.allgather_object(fingerprint)
    with comm.agreed():
        for rank, other in enumerate(others, start=1):
            parts = [part for part in first if first[part] != other[part]]
            if parts:
                raise InputError(
                    f"--model {source.name}: {comm.name(rank)} finds another model than {comm.name(0)} "
                    f"(in {' and '.join(parts)}); give all hosts the same files"
                )
    if comm.rank == 0 and SOCKET_VARIABLE not in os.environ:  # else the launcher has said it
        warn_of_unread_fields(source)
    return source


def device_of(comm, source, dtype="auto"):
    """Where this rank computes, in --dtype: on the GPU that `comm` knows of, or on the CPU."""
    if getattr(comm, "gpu", None) is None:
        return open_device(dtype)
    from minitp.cuda.gpu import with_dtype

    return with_dtype(comm.gpu, dtype, source.config.dtype)


def check_room(comm, source, device):
    """AgreedError on all ranks if those in one place have no room for their weights; all ranks call this."""
    where, room = device.weights_room()
    need = shard_nbytes(source.plan, comm.shard_rank, device)
    needs = [nbytes for place, nbytes in comm.allgather_object((where, need)) if place == where]
    with comm.agreed():
        if sum(needs) > room:
            raise InputError(
                f"{source.name}: the weights of {counted(len(needs), 'rank')} in {device.dtype} take "
                f"{size(sum(needs))}, and {where} has {size(room)}; minitp plan says what fits"
            )


def load_model(source, comm, device, progress=lambda nbytes: None, kv_dtype="auto", path="auto"):
    """This rank's Model of a ModelSource.

    Parameters
    ----------
    source : ModelSource
    comm : Comm
    device : Device
    progress : callable
        Gets the bytes of each array loaded.
    kv_dtype : str
        As --kv-dtype.
    path : str
        explicit: through `ops`; fused: through the kernels of `cuda`, on a GPU; auto: fused where it can be.

    Raises
    ------
    InputError
        if the path cannot be had.
    """
    given = source.plan, comm.shard_rank, source.tensors, device, progress
    if not device.is_gpu:
        if path == "fused":
            raise InputError("--path fused is made of kernels for GPUs; leave it out, or give --device cuda")
        return Model(source.config, source.plan, Loader(*given).load(), comm, device, kv_dtype)
    from minitp.cuda.fused import FusedModel, unfit
    from minitp.cuda.loader import GpuLoader

    reason = unfit(source.config, source.plan, device, kv_dtype)
    if path == "fused" and reason is not None:
        raise InputError(f"--path fused: {reason}; use --path explicit")
    kind = Model if path == "explicit" or reason is not None else FusedModel
    return kind(source.config, source.plan, GpuLoader(*given).load(), comm, device, kv_dtype)
