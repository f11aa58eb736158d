"""The transport that --comm chooses: between the ranks' hosts, and between their GPUs.

--comm   on CPUs                                      on GPUs (whose hosts then use auto)
auto     shm if any two ranks share a host, else mpi  peer if the GPUs reach each other, else nccl
mpi      messages                                     messages, through the hosts' memory
shm      shared memory, messages between hosts        shared memory, through the hosts' memory
nccl                                                  NCCL
peer                                                  small sums in the GPUs' own memory, else NCCL
"""

from minitp.errors import InputError
from minitp.launch.devices import ON_GPUS, on_gpus, open_rank_gpu, refuse_on_cpus


def select_host_comm(comm, transport="auto"):
    """The Comm between the hosts of the ranks, who need one for all that is no array; all ranks call it.

    Parameters
    ----------
    comm : MpiComm
    transport : str
        As --comm; nccl and peer are of GPUs, and auto between their hosts.

    Raises
    ------
    AgreedError
        on all ranks, if no two of them share a host and `transport` is shm.
    """
    if transport == "mpi":
        return comm
    from mpi4py import MPI

    from minitp.comm.hierarchical import HierarchicalComm
    from minitp.comm.shared_memory import SharedMemoryComm

    node = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    most = max(comm.allgather_object(node.size))
    if node.size == comm.size:
        return SharedMemoryComm(node)
    if most > 1:
        return HierarchicalComm(node)
    if transport == "shm":
        comm.agree(InputError("--comm shm: every rank is on a host of its own; use --comm mpi"))
    return comm


def select_comm(comm, device, transport="auto", share_gpu=False):
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
    if not on_gpus(comm, device):
        with comm.agreed():
            refuse_on_cpus(transport, share_gpu)
        return comm
    from minitp.comm.single import SingleRank
    from minitp.cuda.comm import LocalComm, StagedComm
    from minitp.cuda.nccl import NcclComm, allow_shared_gpu
    from minitp.cuda.peer import PeerComm, peers_reach_each_other

    local_rank = comm.local_rank()
    gpu, shared = open_rank_gpu(comm, local_rank, share_gpu)
    if isinstance(comm, SingleRank):
        return LocalComm(comm, gpu)
    if transport in ("mpi", "shm"):
        return StagedComm(comm, gpu)
    if shared and not all(comm.allgather_object(allow_shared_gpu())):
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
