"""The transport that --comm selects, between the hosts of the ranks and between their GPUs.

--comm   on CPUs                                      on GPUs (their hosts then use auto)
auto     shm if any two ranks share a host, else mpi  the fastest of peer (if possible), nccl and the hosts'
mpi      MPI messages                                 MPI messages, through host memory
shm      shared memory, messages between hosts        shared memory, through host memory
nccl                                                  NCCL
peer                                                  small sums in the GPUs' own memory, else NCCL
"""

import os
import sys

from minitp.errors import AgreedError, InputError
from minitp.launch.devices import GPU_TRANSPORTS, on_gpus, open_rank_gpu, reject_on_cpus
from minitp.util.environment import replica_of


def select_host_comm(comm, transport="auto"):
    """Return the Comm between the hosts of the ranks, which transfers Python objects; all ranks call this.

    Parameters
    ----------
    comm : MpiComm
    transport : str
        The value of --comm. With nccl and peer, which connect GPUs, the hosts use auto.

    Raises
    ------
    AgreedError
        On all ranks, if `transport` is shm and no two ranks share a host.
    """
    if transport == "mpi":
        return comm
    from minitp.comm.groups import OnlyRankOfGroup
    from minitp.comm.hierarchical import HierarchicalComm
    from minitp.comm.shared_memory import SharedMemoryComm

    if comm.size == 1 and comm.group is not None:
        return OnlyRankOfGroup(comm)
    node = comm.split_by_host()
    ranks_per_host = max(comm.allgather_object(node.size))
    if node.size == comm.size:
        return SharedMemoryComm(node, comm.group)
    if ranks_per_host > 1:
        return HierarchicalComm(node, comm.group)
    if transport == "shm":
        comm.agree(InputError("--comm shm: no two ranks share a host; use --comm mpi"))
    return comm


def select_comm(comm, device, transport="auto", share_gpu=False):
    """Return the Comm for the arrays of the ranks; all ranks call this.

    Parameters
    ----------
    comm : Comm
        The Comm between the hosts of the ranks.
    device, transport : str
        The values of --device and --comm.
    share_gpu : bool
        Let several ranks use one GPU.

    Returns
    -------
    Comm
        `comm` itself on CPUs; on GPUs a cuda.comm.DeviceComm, whose `gpu` is this rank's GPU.

    Raises
    ------
    AgreedError
        On all ranks, if a rank has no GPU, an option does not fit the devices, or NCCL does not start (with
        auto, the ranks then use the hosts' memory, with a warning).
    """
    if not on_gpus(comm, device):
        with comm.agreed():
            reject_on_cpus(transport, share_gpu)
        return comm
    from minitp.comm.single import SingleRank
    from minitp.cuda.choice import TransportChoice, warn_of_failures
    from minitp.cuda.comm import LocalComm, StagedComm
    from minitp.cuda.nccl import NcclComm, allow_shared_gpu
    from minitp.cuda.peer import PeerComm, peers_reach_each_other

    local_rank = comm.local_rank() + replica_of(os.environ)[0] * comm.size
    gpu, shared = open_rank_gpu(comm, local_rank, share_gpu)
    if isinstance(comm, SingleRank):
        return LocalComm(comm, gpu)
    if transport in ("mpi", "shm"):
        return StagedComm(comm, gpu)
    if shared and not all(comm.all_groups.allgather_object(allow_shared_gpu())):
        with comm.agreed():
            if transport in GPU_TRANSPORTS:
                raise InputError(
                    f"--comm {transport}: several ranks can share a GPU only with NCCL 2.30 or newer, and "
                    "this NCCL is older; omit --comm, or use --comm mpi"
                )
        return StagedComm(comm, gpu)
    reach = peers_reach_each_other(comm, gpu, local_rank)
    with comm.agreed():
        if transport == "peer" and not reach:
            raise InputError("--comm peer: the GPUs cannot all read each other's memory; use --comm nccl")
    kind = PeerComm if reach and transport != "nccl" else NcclComm
    try:
        return kind(comm, gpu, auto=transport == "auto")
    except AgreedError as error:
        if transport != "auto":
            raise
        staged = StagedComm(comm, gpu)
        staged.choice = TransportChoice(staged.transport, 0, failed={"nccl": str(error)})
        warn_of_failures(comm, staged.choice)
        return staged


def transport_of(comm):
    """Return the transport of a model's Comm, and the measurements of --comm auto, as a dict for JSON."""
    choice = getattr(comm, "choice", None)
    return {
        "name": getattr(comm, "transport", None),
        "all_reduce_bytes": choice and choice.nbytes,
        "all_reduce_us": {name: round(1e6 * s, 1) for name, s in choice.seconds.items()} if choice else {},
        "failed": choice.failed if choice else {},
    }


def tell_choice(comm, verbose):
    """Print on rank 0 what --comm auto has measured and chosen, with `verbose`."""
    choice = getattr(comm, "choice", None)
    if verbose and comm.rank == 0 and choice is not None:
        print(f"minitp: {choice.words()}", file=sys.stderr)
