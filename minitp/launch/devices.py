"""Devices: whether the ranks compute on GPUs, and which GPU each rank opens."""

import sys

from minitp.errors import InputError
from minitp.util.environment import cores, gpus
from minitp.util.format import counted

RANKS_PER_CORE = 16  # with --replicas; more are a mistake and would block the machine
GPU_TRANSPORTS = ("nccl", "peer")  # values of --comm that need GPUs


def on_gpus(comm, device):
    """Return whether the ranks compute on GPUs; with --device auto they do if every host has a GPU."""
    return device == "cuda" or (device == "auto" and all(comm.all_groups.allgather_object(gpus() > 0)))


def reject_on_cpus(transport, share_gpu):
    """Reject the options that only make sense on GPUs."""
    if transport in GPU_TRANSPORTS:
        raise InputError(f"--comm {transport} needs GPUs; omit it, or add --device cuda")
    if share_gpu:
        raise InputError("--share-gpu needs GPUs; omit it, or add --device cuda")


def check_gpus(device, share_gpu, tp, replicas):
    """Refuse more replicas of `tp` ranks than this host's GPUs or cores allow, before any rank starts."""
    ranks, most = tp * replicas, RANKS_PER_CORE * cores()
    if replicas > 1 and (device == "cpu" or not gpus()) and ranks > most:
        raise InputError(
            f"--replicas {replicas} of {counted(tp, 'rank')}: {counted(ranks, 'rank')} are too many for "
            f"{counted(cores(), 'core')}; use at most {RANKS_PER_CORE} per core"
        )
    if replicas > 1 and device != "cpu" and not share_gpu and 0 < gpus() < ranks:
        raise InputError(
            f"--replicas {replicas} of {counted(tp, 'rank')}: each rank needs a GPU, and this host has "
            f"{counted(gpus(), 'GPU')} for {ranks}; use fewer, or --share-gpu (results are correct "
            "but slow), or --device cpu"
        )


def open_rank_gpu(comm, local_rank, share_gpu):
    """Open the GPU that matches this rank's local rank; all ranks call this.

    Returns
    -------
    gpu : Gpu
    shared : bool
        True if any two ranks share a GPU, in any replica group.

    Raises
    ------
    AgreedError
        On all ranks, if a rank has no GPU, or would have to share one and `share_gpu` is not set.
    """
    from minitp.cuda.gpu import open_gpu

    gpu = None
    with comm.agreed():
        gpu = open_gpu(local_rank, share_gpu)
    shared = any(comm.all_groups.allgather_object(local_rank >= gpu.gpus))
    if shared and comm.all_groups.rank == 0:
        print("minitp: warning: several ranks share a GPU: results are correct but slow", file=sys.stderr)
    return gpu, shared
