"""Loading of a model, with a progress bar."""

import sys
from time import perf_counter

from tqdm import tqdm

from minitp.launch.transport import tell_choice
from minitp.load import check_room, device_of, load_model
from minitp.loading.weights import shard_nbytes


def load(args, comm, source, path="auto"):
    """Load and return this rank's Model, and the seconds that this took; `path` is as in `load_model`."""
    started = perf_counter()
    device = device_of(comm, source, args.dtype)
    check_room(comm, source, device)
    with (
        comm.agreed(),
        tqdm(
            total=shard_nbytes(source.plan, comm.shard_rank, device),
            desc=f"loading {source.name}, rank {comm.shard_rank} of {comm.size}",
            unit="B",
            unit_scale=True,
            leave=False,
            disable=comm.rank != 0 or not sys.stderr.isatty(),
        ) as bar,
    ):
        model = load_model(source, comm, device, bar.update, getattr(args, "kv_dtype", "auto"), path)
    model.connect()
    tell_choice(model.comm, getattr(args, "verbose", False))
    return model, perf_counter() - started
