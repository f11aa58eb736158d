"""How ranks meet: a few collectives, the same behind every transport.

    all_reduce   rank 0 [a]  rank 1 [b]   ->  [a + b] on both
    all_gather   rank 0 [a]  rank 1 [b]   ->  [a | b] on both

Data (arrays of activations) goes through these two, control (small Python objects) through `broadcast`,
`exchange` and `agree`. Every rank calls the same ones in the same order, on the error path too:
a phase that may fail on one rank ends in `agree`, and then all of them leave together.

The sum of an all-reduce depends on the order of its terms. Here every rank gets all the terms and adds them
in rank order (16-bit ones in float32), so all ranks hold the same bits, in any dtype and with any MPI.

    Alone        one rank: nothing to exchange
    OneOfMany    one rank with the share of one of several, for benchmarks
    ThreadComm   ranks as threads of one process, for tests and notebooks

Ranks as MPI processes are in mpi_comm, shared_memory and several_hosts, those on GPUs in cuda.comm.
"""

import threading
from contextlib import contextmanager
from time import perf_counter

import numpy as np

from minitp.errors import AgreedError, InputError, RankError, one_line


class Comm:
    """What the ranks of a model share. Subclasses say how values travel.

    Attributes
    ----------
    rank, size : int
    share : int
        The rank whose part of the model is computed here: this one, but for OneOfMany.
    seconds : float
        Time this rank has spent in `all_reduce` and `all_gather`, waiting included.
    """

    def __init__(self, rank, size):
        self.rank = rank
        self.size = size
        self.share = rank
        self.seconds = 0.0

    def all_reduce(self, x):
        """The sum over all ranks of `x` (same shape everywhere), the same bits on each. A new array."""
        started = perf_counter()
        total = self._exchange_arrays(x, [x.size] * self.size, _sum_in_rank_order).reshape(x.shape)
        self.seconds += perf_counter() - started
        return total

    def all_gather(self, x, widths):
        """The ranks' columns side by side: from `x` [T, widths[rank]] to [T, sum(widths)], on all ranks."""
        started = perf_counter()
        rows = x.shape[0]

        def join(parts):
            return np.concatenate([p.reshape(rows, -1) for p in parts], axis=-1)  # [T, sum(widths)]

        joined = self._exchange_arrays(x, [rows * width for width in widths], join)
        self.seconds += perf_counter() - started
        return joined

    def broadcast(self, value):
        """Rank 0's `value`, on every rank; what the others pass is ignored. Any picklable object."""
        raise NotImplementedError

    def exchange(self, value):
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
        failed = [(rank, *e) for rank, e in enumerate(self.exchange(mine)) if e is not None]
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

    def _exchange_arrays(self, x, sizes, combine):
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


class Alone(Comm):
    """One rank: every collective is the identity."""

    def __init__(self):
        super().__init__(rank=0, size=1)

    def broadcast(self, value):
        return value

    def abort(self, exit_code):
        """Nobody waits: the error that led here goes on."""

    def _exchange_arrays(self, x, sizes, combine):
        return combine([x.reshape(-1)])

    def exchange(self, value):
        return [value]


class OneOfMany(Alone):
    """The only rank, which computes the share of one of `size` ranks: for benchmarks.

    Nobody else is there, so every sum is its own term and every gathering its own part repeated. What comes
    of it is wrong, and takes as long as that rank needs between the collectives.
    """

    def __init__(self, share, size):
        super().__init__()
        self.share, self.size = share, size

    def _exchange_arrays(self, x, sizes, combine):
        return combine([np.resize(x, size) for size in sizes])


class ThreadComm(Comm):
    """Ranks as threads of one process. `run_threads` makes them."""

    def __init__(self, rank, size, barrier, slots):
        super().__init__(rank, size)
        self._barrier = barrier
        self._slots = slots  # one a rank, shared by all

    def broadcast(self, value):
        return self._meet("broadcast", value, lambda values: values[0])

    def end(self):
        """This rank will call nothing more; waits for the others."""
        self._meet("the end", None, list)

    def abort(self, exit_code):
        self._barrier.abort()

    def _exchange_arrays(self, x, sizes, combine):
        return self._meet("an exchange of arrays", x.reshape(-1), combine)

    def exchange(self, value):
        return self._meet("an exchange of objects", value, list)

    def _meet(self, where, value, use):
        """use(everybody's values), called between two barriers: nobody changes a value while it is read."""
        self._slots[self.rank] = (where, value)
        try:
            self._barrier.wait()
            places = [place for place, _ in self._slots]
            if len(set(places)) > 1:
                apart = ", ".join(f"rank {rank} in {place}" for rank, place in enumerate(places))
                raise RankError(f"ranks have parted: {apart}")
            result = use([value for _, value in self._slots])
            self._barrier.wait()
        except threading.BrokenBarrierError:
            raise _WokenError(f"rank {self.rank}: another rank has failed") from None
        return result


class _WokenError(RankError):
    """A rank's wait has ended because another rank failed: never the cause."""


def run_threads(size, function):
    """Call function(comm) on `size` ranks, each a thread; return their results in rank order.

    If one raises, the others are woken from whatever collective they wait in, and its exception is raised
    here; so is a RankError if ranks meet in different collectives, or one ends while others wait.

    >>> run_threads(3, lambda comm: float(comm.all_reduce(np.ones(1))[0]))
    [3.0, 3.0, 3.0]
    """
    if size == 1:
        return [function(Alone())]
    barrier, slots = threading.Barrier(size), [None] * size
    comms = [ThreadComm(rank, size, barrier, slots) for rank in range(size)]
    results, errors = [None] * size, [None] * size

    def run(comm):
        try:
            results[comm.rank] = function(comm)
            comm.end()
        except BaseException as error:
            errors[comm.rank] = error
            comm.abort(RankError.exit_code)

    threads = [threading.Thread(target=run, args=(c,), name=f"rank {c.rank}", daemon=True) for c in comms]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:  # it comes to this thread only; the ranks leave at their next collective
        barrier.abort()
        raise
    causes = [error for error in errors if error is not None and not isinstance(error, _WokenError)]
    if causes:
        raise causes[0]
    return results
