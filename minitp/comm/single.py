"""The communicators of a single process, whose collectives need no communication."""

import numpy as np

from minitp.comm.base import Comm


class SingleRank(Comm):
    """The only rank of a world of size 1."""

    def __init__(self):
        super().__init__(rank=0, size=1)

    def broadcast(self, value):
        return value

    def abort(self, exit_code):
        """Do nothing: there are no other ranks to end, and the error ends this process."""

    def _gather_and_combine(self, x, sizes, combine):
        return combine([x.reshape(-1)])

    def allgather_object(self, value):
        return [value]


class ShardOnly(SingleRank):
    """A single process that computes one rank's shard of a world of `size` ranks, for benchmarks.

    The other ranks do not exist, so an all-reduce returns this rank's own term and an all-gather repeats this
    rank's part. The results are wrong, but the times between collectives are those of the real rank.
    """

    def __init__(self, shard_rank, size):
        super().__init__()
        self.shard_rank, self.size = shard_rank, size

    def _gather_and_combine(self, x, sizes, combine):
        return combine([np.resize(x, size) for size in sizes])
