"""Ranks as threads of one process, for tests and notebooks."""

import threading

from minitp.comm.base import Comm
from minitp.comm.single import SingleRank
from minitp.errors import RankError


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

    def _gather_and_combine(self, x, sizes, combine):
        return self._meet("an exchange of arrays", x.reshape(-1), combine)

    def allgather_object(self, value):
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
    except KeyboardInterrupt:  # it comes to this thread only; the ranks leave at their next collective
        barrier.abort()
        raise
    causes = [error for error in errors if error is not None and not isinstance(error, _WokenError)]
    if causes:
        raise causes[0]
    return results
