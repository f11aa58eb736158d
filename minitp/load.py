"""Loading of a model: open its source, choose the device, and load this rank's weights."""

import os

from minitp.device import open_device
from minitp.errors import InputError
from minitp.loading.source import open_model, warn_of_unread_fields
from minitp.loading.weights import Loader, shard_nbytes
from minitp.model import Model
from minitp.util.environment import SOCKET_VARIABLE
from minitp.util.format import counted, size


def open_source(comm, name, layers=None, revision=None):
    """Open the ModelSource of a name on every rank, and check that all ranks have found the same model.

    Raises
    ------
    AgreedError
        On all ranks, if one of them cannot open the source, or finds a different model under that name.
    """
    source = fingerprint = None
    with comm.agreed():  # rank 0 goes first, because it may have to download the model
        if comm.rank == 0:
            source = open_model(name, comm.size, layers, revision)
    with comm.agreed():
        if comm.rank != 0:
            source = open_model(name, comm.size, layers, revision)
        fingerprint = source.fingerprint()
    first, *others = comm.allgather_object(fingerprint)
    with comm.agreed():
        for rank, other in enumerate(others, start=1):
            parts = [part for part in first if first[part] != other[part]]
            if parts:
                raise InputError(
                    f"--model {source.name}: {comm.name(rank)} found a different model than {comm.name(0)} "
                    f"(in {' and '.join(parts)}); copy the same files to all hosts"
                )
    if comm.rank == 0 and not os.environ.get(SOCKET_VARIABLE):  # otherwise the launcher has already warned
        warn_of_unread_fields(source)
    return source


def device_of(comm, source, dtype="auto"):
    """Return the Device of this rank for --dtype: the GPU of `comm` if it has one, otherwise the CPU."""
    if getattr(comm, "gpu", None) is None:
        return open_device(dtype)
    from minitp.cuda.gpu import with_dtype

    return with_dtype(comm.gpu, dtype, source.config.dtype)


def check_room(comm, source, device):
    """Check that the weights of all ranks that share memory fit into it; all ranks call this.

    Raises
    ------
    AgreedError
        On all ranks, if the weights of some ranks do not fit.
    """
    where, room = device.weights_room()
    need = shard_nbytes(source.plan, comm.shard_rank, device)
    needs = [nbytes for other, nbytes in comm.allgather_object((where, need)) if other == where]
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
