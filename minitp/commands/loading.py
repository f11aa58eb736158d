"""Loading a model, as the commands show it."""

import sys
from time import perf_counter

from tqdm import tqdm

from minitp.device import open_device
from minitp.model import load_model
from minitp.weights import shard_nbytes


def load(args, comm, source):
    """This rank's Model, with a progress bar of rank 0's share on a terminal; and the seconds it took."""
    started = perf_counter()
    device = open_device(args.dtype)
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
        model = load_model(source, comm, device, bar.update, getattr(args, "kv_dtype", "auto"))
    return model, perf_counter() - started
