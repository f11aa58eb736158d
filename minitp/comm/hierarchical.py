"""Collectives of ranks on several hosts: shared memory within each host, MPI between the hosts.

    host A                     host B
    rank 0  rank 1             rank 2  rank 3
       \\_____/                    \\_____/      shared memory: each leader reads the parts of its host
        rank 0  <--- MPI --->      rank 2        MPI: the leaders exchange the parts of their hosts
       /     \\                    /     \\      shared memory: every rank reads all parts

So each part crosses the network once per host, not once per rank.
"""

import numpy as np

from minitp.comm.mpi import MpiComm
from minitp.comm.shared_memory import SharedMemoryComm


class HierarchicalComm(MpiComm):
    """Ranks as MPI processes on several hosts, with more than one rank on some of them.

    Parameters
    ----------
    node : mpi4py.MPI.Comm
        The communicator of the ranks on this host.
    group : groups.Group or None
        See MpiComm.
    """

    transport = "shm"

    def __init__(self, node, group=None):
        super().__init__(group=group)
        self._within = SharedMemoryComm(node, group)
        self._leaders = self.split(0 if node.rank == 0 else 1)  # color 0: the leaders
        self._between = MpiComm(world=self._leaders, group=group) if node.rank == 0 else None
        self._own_host = node.allgather(self.rank)  # the ranks of this host, the leader first
        host_of_rank = self._world.allgather(self._own_host)
        # The ranks of each host, in the order of the leaders.
        self._hosts = [ranks for rank, ranks in enumerate(host_of_rank) if rank == ranks[0]]

    def close(self):
        super().close()
        self._within.close()
        self._leaders.Free()

    def broadcast(self, value):
        if self._between:
            value = self._between.broadcast(value)
        return self._within.broadcast(value)

    def _gather_and_combine(self, x, sizes, combine):
        own = self._within._gather_and_combine(x, [sizes[rank] for rank in self._own_host], np.concatenate)
        lengths = [sum(sizes[rank] for rank in host) for host in self._hosts]
        gathered = np.empty(0, x.dtype)
        if self._between:
            gathered = self._between._gather_and_combine(own, lengths, np.concatenate)
        lengths = [sum(lengths)] + [0] * (self._within.size - 1)  # only the leader has data to share
        gathered = self._within._gather_and_combine(gathered, lengths, np.concatenate)
        by_host = [rank for host in self._hosts for rank in host]
        starts = np.cumsum([sizes[rank] for rank in by_host])[:-1]
        parts = dict(zip(by_host, np.split(gathered, starts), strict=True))
        return combine([parts[rank] for rank in range(self.size)])
