"""Collectives of ranks on several hosts: shared memory within each host, MPI between them.

    host A                     host B
    rank 0  rank 1             rank 2  rank 3
       \\_____/                    \\_____/      shared memory: each host's leader sees its parts
        rank 0  <--- MPI --->      rank 2        the leaders exchange what their hosts have
       /     \\                    /     \\      shared memory: everybody reads all parts

So what crosses the network crosses it once a host, not once a rank.
"""

import numpy as np

from minitp.comm.mpi import MpiComm
from minitp.comm.shared_memory import SharedMemoryComm


class HierarchicalComm(MpiComm):
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

    def _gather_and_combine(self, x, sizes, combine):
        own = self._within._gather_and_combine(x, [sizes[rank] for rank in self._mine], np.concatenate)
        lengths = [sum(sizes[rank] for rank in host) for host in self._hosts]
        everyone = np.empty(0, x.dtype)
        if self._between:
            everyone = self._between._gather_and_combine(own, lengths, np.concatenate)
        lengths = [sum(lengths)] + [0] * (self._within.size - 1)
        everyone = self._within._gather_and_combine(everyone, lengths, np.concatenate)
        by_host = [rank for host in self._hosts for rank in host]
        starts = np.cumsum([sizes[rank] for rank in by_host])[:-1]
        parts = dict(zip(by_host, np.split(everyone, starts), strict=True))
        return combine([parts[rank] for rank in range(self.size)])
