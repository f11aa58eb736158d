"""Loading a model, as the commands show it."""

import sys
from time import perf_counter

from tqdm import tqdm

from minitp.device import open_device
from minitp.errors import InputError
from minitp.model import load_model
from minitp.table import counted, size
from minitp.weights import shard_nbytes


def device_of(args, comm, source):
    """Where this rank computes: on the GPU that `comm` knows of, or on the CPU."""
    if getattr(comm, "gpu", None) is None:
        return open_device(args.dtype)
    from minitp.cuda.gpu import with_dtype

    return with_dtype(comm.gpu, args.dtype, source.config.dtype)


def check_room(comm, source, device):
    """AgreedError on all ranks if those in one place have no room for their weights; all ranks call this."""
    where, room = device.weights_room()
    need = shard_nbytes(source.plan, comm.share, device)
    needs = [nbytes for place, nbytes in comm.exchange((where, need)) if place == where]
    with comm.agreed():
        if sum(needs) > room:
            raise InputError(
                f"{source.name}: the weights of {counted(len(needs), 'rank')} in {device.dtype} take "
                f"{size(sum(needs))}, and {where} has {size(room)}; minitp plan says what fits"
            )


def load(args, comm, source, path="auto"):
    """This rank's Model, on a path of `load_model`, and the seconds it took; rank 0 shows its progress."""
    started = perf_counter()
    device = device_of(args, comm, source)
    check_room(comm, source, device)
    with (
        comm.agreed(),
        tqdm(
            total=shard_nbytes(source.plan, comm.share, device),
            desc=f"loading {source.name}, rank {comm.share} of {comm.size}",
            unit="B",
            unit_scale=True,
            leave=False,
            disable=comm.rank != 0 or not sys.stderr.isatty(),
        ) as bar,
    ):
        model = load_model(source, comm, device, bar.update, getattr(args, "kv_dtype", "auto"), path)
    model.connect()
    return model, perf_counter() - started
