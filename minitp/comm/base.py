"""The collectives of a tensor-parallel model, the same for every transport.

    all_reduce   rank 0 [a]  rank 1 [b]   ->  [a + b] on both
    all_gather   rank 0 [a]  rank 1 [b]   ->  [a | b] on both

Arrays of activations go through these two, and small Python objects through `broadcast`, `allgather_object`
and `agree`. Every rank calls the same collectives in the same order, even after an error: a phase that may
fail on one rank ends with `agree`, and if it has failed, all ranks raise the error.

A floating-point sum depends on the order of its terms. So in an all-reduce every rank gets all the terms and
adds them in rank order (16-bit terms in float32). All ranks then hold the same bits, in any dtype and with
any MPI.

A subclass implements the transport: within one process (single, threads), between MPI processes (mpi,
shared_memory, hierarchical), or between GPUs (cuda.comm, cuda.nccl, cuda.peer).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np

from minitp.errors import AgreedError, InputError, RankError, one_line

Array = Any  # numpy.ndarray, or cupy.ndarray on a GPU


class Comm:
    """One rank's connection to the other ranks of a model; a subclass implements the transport.

    Attributes
    ----------
    rank, size : int
    shard_rank : int
        The rank whose shard of the model this rank computes: `rank`, except in ShardOnly.
    seconds : float
        The time that this rank has spent in `all_reduce` and `all_gather`, including waiting.
    all_groups : Comm
        The Comm of the ranks of all replica groups, in the order of the groups; `self` if there is one group.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.shard_rank = rank, size, rank
        self.seconds = 0.0
        self.all_groups = self

    def all_reduce(self, x: Array) -> Array:
        """Return the sum of `x` over all ranks, a new array of its shape; all ranks get the same bits."""
        started = perf_counter()
        total = self._gather_and_combine(x, [x.size] * self.size, _sum_in_rank_order).reshape(x.shape)
        self.seconds += perf_counter() - started
        return total

    def all_gather(self, x: Array, widths: list[int]) -> Array:
        """Concatenate the columns of all ranks: `x` [T, widths[rank]] -> [T, sum(widths)]."""
        started = perf_counter()
        rows = x.shape[0]

        def join(parts):
            return np.concatenate([p.reshape(rows, -1) for p in parts], axis=-1)  # [T, sum(widths)]

        joined = self._gather_and_combine(x, [rows * width for width in widths], join)
        self.seconds += perf_counter() - started
        return joined

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's `value`, any picklable object, on every rank; the others' values are ignored."""
        raise NotImplementedError

    def allgather_object(self, value: Any) -> list[Any]:
        """Return [rank 0's value, rank 1's value, ..] on every rank; the values are any picklable objects."""
        raise NotImplementedError

    def agree(self, error: BaseException | None = None) -> None:
        """End a phase that may have failed: every rank passes its exception, or None.

        Raises
        ------
        AgreedError
            On every rank, if any rank passed an exception; of several, the first in rank order is raised. The
            exit code is 2 for an InputError and 3 for any other exception, whose message names the rank.
        """
        own = None
        if error is not None:
            own = (getattr(error, "exit_code", RankError.exit_code), one_line(error))
        failed = [(rank, *e) for rank, e in enumerate(self.allgather_object(own)) if e is not None]
        if failed:
            rank, exit_code, message = failed[0]
            if exit_code != InputError.exit_code:
                message = f"{self.name(rank)} failed: {message}"
            raise AgreedError(message, exit_code) from error

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Run a `with` block that ends with `agree`: if it fails on one rank, it fails on all of them."""
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.agree(error)

    def name(self, rank: int) -> str:
        """Return the name of a rank for messages."""
        return f"rank {rank}"

    def abort(self, exit_code: int) -> None:
        """End the whole job from one rank, without waiting for the others."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise RankError if a collective on a GPU has failed, which makes its result invalid."""

    def local_rank(self) -> int:
        """Return this rank's index among the ranks of its host; all ranks call this."""
        return self.rank

    def close(self) -> None:
        """Free the resources of the transport; all ranks call this after their last collective."""

    def _gather_and_combine(
        self, x: Array, sizes: list[int], combine: Callable[[list[Array]], Array]
    ) -> Array:
        """Return combine(parts), where parts[r] is rank r's array, flat, with sizes[r] elements.

        `combine` must return a new array, because the parts may be the other ranks' own arrays.
        """
        raise NotImplementedError


def _sum_in_rank_order(parts):
    dtype = parts[0].dtype
    total = parts[0].astype(np.promote_types(dtype, np.float32))  # 16-bit terms are summed in float32
    for part in parts[1:]:
        total += part
    return total.astype(dtype, copy=False)  # and rounded once
