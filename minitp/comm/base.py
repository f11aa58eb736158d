"""How ranks meet: a few collectives, the same behind every transport.

    all_reduce   rank 0 [a]  rank 1 [b]   ->  [a + b] on both
    all_gather   rank 0 [a]  rank 1 [b]   ->  [a | b] on both

Data (arrays of activations) goes through these two, control (small Python objects) through `broadcast`,
`allgather_object` and `agree`. Every rank calls the same ones in the same order, on the error path too:
a phase that may fail on one rank ends in `agree`, and then all of them leave together.

The sum of an all-reduce depends on the order of its terms. Here every rank gets all the terms and adds them
in rank order (16-bit ones in float32), so all ranks hold the same bits, in any dtype and with any MPI.

A subclass says how values travel: within one process (single, threads), between MPI processes (mpi,
shared_memory, hierarchical), or between GPUs (cuda.comm, cuda.nccl, cuda.peer).
"""

from contextlib import contextmanager
from time import perf_counter

import numpy as np

from minitp.errors import AgreedError, InputError, RankError, one_line


class Comm:
    """What the ranks of a model share. Subclasses say how values travel.

    Attributes
    ----------
    rank, size : int
    shard_rank : int
        The rank whose shard of the model is computed here: `rank`, except in ShardOnly.
    seconds : float
        Time this rank has spent in `all_reduce` and `all_gather`, waiting included.
    """

    def __init__(self, rank, size):
        self.rank = rank
        self.size = size
        self.shard_rank = rank
        self.seconds = 0.0

    def all_reduce(self, x):
        """The sum over all ranks of `x` (same shape everywhere), the same bits on each. A new array."""
        started = perf_counter()
        total = self._gather_and_combine(x, [x.size] * self.size, _sum_in_rank_order).reshape(x.shape)
        self.seconds += perf_counter() - started
        return total

    def all_gather(self, x, widths):
        """The ranks' columns side by side: from `x` [T, widths[rank]] to [T, sum(widths)], on all ranks."""
        started = perf_counter()
        rows = x.shape[0]

        def join(parts):
            return np.concatenate([p.reshape(rows, -1) for p in parts], axis=-1)  # [T, sum(widths)]

        joined = self._gather_and_combine(x, [rows * width for width in widths], join)
        self.seconds += perf_counter() - started
        return joined

    def broadcast(self, value):
        """Rank 0's `value`, on every rank; what the others pass is ignored. Any picklable object."""
        raise NotImplementedError

    def allgather_object(self, value):
        """[rank 0's value, rank 1's, ..] on every rank; any picklable objects."""
        raise NotImplementedError

    def agree(self, error=None):
        """End a phase that may have failed here: every rank passes its exception or None.

        Raises
        ------
        AgreedError
            on every rank, if any rank passed an exception: the first one in rank order. Its exit code is 2
            if it was an InputError, else 3, and then the message names the rank.
        """
        mine = None
        if error is not None:
            mine = (getattr(error, "exit_code", RankError.exit_code), one_line(error))
        failed = [(rank, *e) for rank, e in enumerate(self.allgather_object(mine)) if e is not None]
        if failed:
            rank, exit_code, message = failed[0]
            if exit_code != InputError.exit_code:
                message = f"{self.name(rank)} failed: {message}"
            raise AgreedError(message, exit_code) from error

    @contextmanager
    def agreed(self):
        """A `with` block that ends in `agree`: if it fails on one rank, it fails on all of them."""
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.agree(error)

    def name(self, rank):
        """A rank, as messages name it."""
        return f"rank {rank}"

    def abort(self, exit_code):
        """End the whole job from one rank, without the others' consent."""
        raise NotImplementedError

    def check(self):
        """Raise RankError if a collective has failed unseen, on a GPU: what came of it is worthless."""

    def local_rank(self):
        """The number of this rank among those of its host; all ranks call it."""
        return self.rank

    def close(self):
        """Leave in good order; all ranks call it, when nothing more is to be exchanged."""

    def _gather_and_combine(self, x, sizes, combine):
        """combine(parts): parts[r] is rank r's array, flat, of sizes[r] elements.

        `combine` must return a new array, for the parts may be the other ranks' own.
        """
        raise NotImplementedError


def _sum_in_rank_order(parts):
    dtype = parts[0].dtype
    total = parts[0].astype(np.promote_types(dtype, np.float32))  # 16-bit terms: sum in float32, round once
    for part in parts[1:]:
        total += part
    return total.astype(dtype, copy=False)
