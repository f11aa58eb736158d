"""Replica groups: an MPI world of R x TP ranks, split into R groups that each have a whole model.

    host A                                 host B
    rank 0  rank 1     rank 2  rank 3      rank 4  rank 5     rank 6  rank 7
    \\____________/     \\____________/      \\____________/     \\____________/
       group 0            group 1             group 2            group 3

The collectives of a forward pass stay within a group. Only `Comm.agree` reaches all groups, because each
group runs the same phases: if one fails, all ranks exit with its error. Consecutive ranks form a group, but
those of one host stay together, even if mpirun has placed the ranks on the hosts in turn.
"""

from dataclasses import dataclass
from typing import Any

from minitp.comm.mpi import MpiComm
from minitp.comm.single import SingleRank


@dataclass(frozen=True)
class Group:
    """A replica group, as one of its ranks sees it.

    Attributes
    ----------
    mpi : mpi4py.MPI.Comm
        The communicator of the group's ranks.
    first : int
        The number of the group's rank 0 in the whole world.
    local_rank : int
        The index of this rank among the ranks of all groups on its host.
    all_groups : MpiComm
        The Comm of all ranks, in the order of the groups.
    """

    mpi: Any
    first: int
    local_rank: int
    all_groups: MpiComm


class OnlyRankOfGroup(SingleRank):
    """The only rank of a replica group, next to other groups in the same MPI world.

    Parameters
    ----------
    comm : MpiComm
        The Comm of the group.
    """

    def __init__(self, comm):
        super().__init__()
        self.group, self.all_groups = comm.group, comm.all_groups
        self.agree, self.name, self.abort = comm.agree, comm.name, comm.abort
        self.local_rank, self.close = comm.local_rank, comm.close


def split_into_groups(comm, count):
    """Split the world of an MpiComm into `count` groups of equal size; return the Comm of this rank's group.

    All ranks call this; `count` must divide their number.
    """
    if count == 1:
        return comm
    size = comm.size // count
    node = comm.split_by_host()
    local_rank = node.Get_rank()
    hosts = comm.allgather_object(node.bcast(comm.rank))  # the first rank on each rank's host
    node.Free()
    position = sorted(range(comm.size), key=lambda rank: (hosts[rank], rank)).index(comm.rank)
    all_groups = MpiComm(world=comm.split(0, position))
    mpi = all_groups.split(all_groups.rank // size)
    first = mpi.bcast(comm.rank)
    return MpiComm(group=Group(mpi, first, local_rank, all_groups))
