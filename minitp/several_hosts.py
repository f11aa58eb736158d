"""Collectives of ranks on several hosts: shared memory within each host, MPI between them.

    host A                     host B
    rank 0  rank 1             rank 2  rank 3
       \\_____/                    \\_____/      shared memory: each host's leader sees its parts
        rank 0  <--- MPI --->      rank 2        the leaders exchange what their hosts have
       /     \\                    /     \\      shared memory: everybody reads all parts

So what crosses the network crosses it once a host, not once a rank.
"""

import numpy as np

from minitp.errors import InputError
from minitp.mpi_comm import MpiComm
from minitp.shared_memory import SharedMemoryComm


class SeveralHostsComm(MpiComm):
    """Ranks as MPI processes of several hosts, of which some have more than one.

    Parameters
    ----------
    node : mpi4py.MPI.Comm
        The ranks of this host.
    """

    def __init__(self, node):
        super().__init__()
        self._within = SharedMemoryComm(node)
        self._leaders = self._world.Split(0 if node.rank == 0 else 1)  # of use to those of colour 0
        self._between = MpiComm(world=self._leaders) if node.rank == 0 else None
        self._mine = node.allgather(self.rank)  # the ranks of this host, the leader first
        every = self._world.allgather(self._mine)
        self._hosts = [ranks for rank, ranks in enumerate(every) if rank == ranks[0]]  # as the leaders are

    def close(self):
        super().close()
        self._within.close()
        self._leaders.Free()

    def broadcast(self, value):
        if self._between:
            value = self._between.broadcast(value)
        return self._within.broadcast(value)

    def _exchange_arrays(self, x, sizes, combine):
        own = self._within._exchange_arrays(x, [sizes[rank] for rank in self._mine], np.concatenate)
        lengths = [sum(sizes[rank] for rank in host) for host in self._hosts]
        everyone = np.empty(0, x.dtype)
        if self._between:
            everyone = self._between._exchange_arrays(own, lengths, np.concatenate)
        lengths = [sum(lengths)] + [0] * (self._within.size - 1)
        everyone = self._within._exchange_arrays(everyone, lengths, np.concatenate)
        by_host = [rank for host in self._hosts for rank in host]
        starts = np.cumsum([sizes[rank] for rank in by_host])[:-1]
        parts = dict(zip(by_host, np.split(everyone, starts), strict=True))
        return combine([parts[rank] for rank in range(self.size)])


def through_shared_memory(comm, transport="auto"):
    """The Comm that --comm asks for, from an MpiComm; all ranks call it.

    Parameters
    ----------
    comm : MpiComm
    transport : str
        mpi, messages only; shm, through shared memory and between hosts by messages; or auto, which is shm if
        any two ranks share a host.

    Raises
    ------
    AgreedError
        on all ranks, if no two of them share a host and `transport` is shm.
    """
    if transport == "mpi":
        return comm
    from mpi4py import MPI

    node = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    most = max(comm.exchange(node.size))
    if node.size == comm.size:
        return SharedMemoryComm(node)
    if most > 1:
        return SeveralHostsComm(node)
    if transport == "shm":
        comm.agree(InputError("--comm shm: every rank is on a host of its own; use --comm mpi"))
    return comm
