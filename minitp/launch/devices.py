"""Which GPU is whose."""

import sys

from minitp.errors import InputError
from minitp.util.environment import gpus

ON_GPUS = ("nccl", "peer")  # of --comm


def on_gpus(comm, device):
    """Whether the ranks compute on GPUs, as --device says: auto is yes if every rank's host has one."""
    return device == "cuda" or (device == "auto" and all(comm.allgather_object(gpus() > 0)))


def refuse_on_cpus(transport, share_gpu):
    """Refuse the options that are for GPUs."""
    if transport in ON_GPUS:
        raise InputError(f"--comm {transport} is for GPUs; leave it out, or give --device cuda")
    if share_gpu:
        raise InputError("--share-gpu needs GPUs; leave it out, or give --device cuda")


def open_rank_gpu(comm, local_rank, share_gpu):
    """Open this rank's GPU, whose number is the rank's own among those of its host; all ranks call it.

    Returns
    -------
    (Gpu, bool)
        And whether any two ranks share one.

    Raises
    ------
    AgreedError
        on all ranks, if one of them has none, or not one of its own and `share_gpu` is not set.
    """
    from minitp.cuda.gpu import open_gpu

    gpu = None
    with comm.agreed():
        gpu = open_gpu(local_rank, share_gpu)
    shared = any(comm.allgather_object(local_rank >= gpu.gpus))
    if shared and comm.rank == 0:
        print("minitp: warning: several ranks share a GPU: results are correct but slow", file=sys.stderr)
    return gpu, shared
