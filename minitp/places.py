"""Where the ranks compute, and how their arrays meet there."""

import sys

from minitp.environment import gpus
from minitp.errors import InputError

ON_GPUS = ("nccl", "peer")  # of --comm


def on_hosts(transport):
    """What --comm says of the ranks' hosts: they need one for all that is no array, too."""
    return "auto" if transport in ON_GPUS else transport


def place_ranks(comm, device, transport="auto", share_gpu=False):
    """The Comm for the arrays of these ranks; all of them call it.

    Parameters
    ----------
    comm : Comm
        Of their hosts.
    device, transport : str
        As --device and --comm.
    share_gpu : bool
        Several ranks may be on one GPU.

    Returns
    -------
    Comm
        `comm` itself on CPUs; a cuda.comm.DeviceComm, whose `gpu` is this rank's, on GPUs.

    Raises
    ------
    AgreedError
        on all ranks, if one of them has no GPU, or NCCL does not come up.
    """
    if device == "auto":
        device = "cuda" if all(comm.exchange(gpus() > 0)) else "cpu"
    if device == "cpu":
        with comm.agreed():
            if transport in ON_GPUS:
                raise InputError(f"--comm {transport} is for GPUs; leave it out, or give --device cuda")
            if share_gpu:
                raise InputError("--share-gpu wants GPUs; leave it out, or give --device cuda")
        return comm
    from minitp.comm import Alone
    from minitp.cuda.comm import LocalComm, StagedComm
    from minitp.cuda.gpu import open_gpu
    from minitp.cuda.nccl import NcclComm, allow_shared_gpu
    from minitp.cuda.peer import PeerComm, peers_reach_each_other

    local_rank, gpu = comm.local_rank(), None
    with comm.agreed():
        gpu = open_gpu(local_rank, share_gpu)
    if isinstance(comm, Alone):
        return LocalComm(comm, gpu)
    shared = any(comm.exchange(local_rank >= gpu.gpus))
    if shared and comm.rank == 0:
        print("minitp: warning: several ranks share a GPU: results are correct but slow", file=sys.stderr)
    if transport in ("mpi", "shm"):
        return StagedComm(comm, gpu)
    if shared and not all(comm.exchange(allow_shared_gpu())):
        with comm.agreed():
            if transport in ON_GPUS:
                raise InputError(
                    f"--comm {transport}: NCCL lets several ranks share a GPU from version 2.30 on, and this "
                    "is an older one; leave --comm out, or use --comm mpi"
                )
        return StagedComm(comm, gpu)
    reach = peers_reach_each_other(comm, gpu, local_rank)
    with comm.agreed():
        if transport == "peer" and not reach:
            raise InputError("--comm peer: the GPUs cannot all read each other's memory; use --comm nccl")
    if transport == "nccl" or not reach:
        return NcclComm(comm, gpu)
    return PeerComm(comm, gpu, required=transport == "peer")
