"""Ranks as threads of one process, for tests and notebooks."""

import threading

from minitp.comm.base import Comm
from minitp.comm.single import SingleRank
from minitp.errors import RankError


class ThreadComm(Comm):
    """A rank as a thread of this process; `run_threads` creates it."""

    transport = "threads"

    def __init__(self, rank, size, barrier, slots):
        super().__init__(rank, size)
        self._barrier = barrier
        self._slots = slots  # one per rank, shared by all ranks

    def broadcast(self, value):
        return self._exchange("broadcast", value, lambda values: values[0])

    def end(self):
        """Wait until all ranks have finished; no collective may follow."""
        self._exchange("end", None, list)

    def abort(self, exit_code):
        self._barrier.abort()

    def _gather_and_combine(self, x, sizes, combine):
        return self._exchange("an exchange of arrays", x.reshape(-1), combine)

    def allgather_object(self, value):
        return self._exchange("an exchange of objects", value, list)

    def _exchange(self, collective, value, combine):
        """Return combine(values of all ranks), called between two barriers so that no value changes."""
        self._slots[self.rank] = (collective, value)
        try:
            self._barrier.wait()
            collectives = [name for name, _ in self._slots]
            if len(set(collectives)) > 1:
                names = ", ".join(f"rank {rank} in {name}" for rank, name in enumerate(collectives))
                raise RankError(f"ranks are in different collectives: {names}")
            result = combine([value for _, value in self._slots])
            self._barrier.wait()
        except threading.BrokenBarrierError:
            raise _WokenError(f"rank {self.rank}: another rank has failed") from None
        return result


class _WokenError(RankError):
    """The error of a rank that stopped waiting because another rank failed; it is never the cause."""


def run_threads(size, function):
    """Call function(comm) on `size` ranks, each in its own thread; return the results in rank order.

    If one rank raises an exception, the others stop waiting in their collectives, and the exception is raised
    by this function. If ranks call different collectives, or one ends while others wait, it is a RankError.

    >>> run_threads(3, lambda comm: float(comm.all_reduce(np.ones(1))[0]))
    [3.0, 3.0, 3.0]
    """
    if size == 1:
        return [function(SingleRank())]
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
    except KeyboardInterrupt:  # raised in this thread only; the ranks stop at their next collective
        barrier.abort()
        raise
    causes = [error for error in errors if error is not None and not isinstance(error, _WokenError)]
    if causes:
        raise causes[0]
    return results
