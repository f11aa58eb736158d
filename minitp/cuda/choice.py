"""The choice of --comm auto between transports of GPU arrays: a few all-reduces are timed over each of them.

A GPU that can read a peer's memory may do so slowly: some GPUs are linked in pairs, and reads from the others
cross PCIe. So the choice is made by time. All ranks choose the same, because rank 0 compares the times of the
slowest rank and broadcasts the name. Replica groups of one world choose together: transports add in different
orders, and the groups' results should have the same bits.
"""

import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from statistics import median

from minitp.cuda.comm import captured
from minitp.errors import AgreedError

CALLS, ROUNDS = 8, 3  # all-reduces timed together, and how often
# A pass that cannot be captured launches each kernel from the host: three to four launches of 5 to 11 µs for
# each all-reduce.
UNCAPTURED_S = 30e-6


@dataclass(frozen=True)
class TransportChoice:
    """The transport that was chosen, the seconds of an all-reduce over each, and the reasons of failures."""

    name: str
    nbytes: int
    seconds: dict = field(default_factory=dict)
    failed: dict = field(default_factory=dict)

    def words(self):
        """Return the choice as a line of text."""
        us = {name: f"{1e6 * seconds:.1f} µs" for name, seconds in self.seconds.items()}
        others = [f"{name}: {time}" for name, time in us.items() if name != self.name]
        others += [f"{name} failed: {reason}" for name, reason in self.failed.items()]
        size = f"{self.nbytes} bytes take {us[self.name]}" if self.name in us else "not measured"
        return f"--comm auto: {self.name} ({'; '.join([size, *others])})"


def choose(host, gpu, candidates, x, failed):
    """Time an all-reduce of `x` over each candidate, and choose the fastest; all ranks call this.

    Parameters
    ----------
    host : Comm
    gpu : Gpu
    candidates : dict of str to DeviceComm and callable
        By name, the Comm and its function reduce(x, out). Every rank has the same candidates.
    x : 16-bit [T, D]
        Zeros, which the sums do not change.
    failed : dict of str to str
        The candidates that have already failed; those that fail here are added.

    Raises
    ------
    AgreedError
        On all ranks, if every candidate fails; it is the last one's error.
    """
    everyone, seconds = host.all_groups, {}
    for name, (comm, reduce) in candidates.items():
        own, last = None, name == list(candidates)[-1]
        try:
            with host.agreed():
                own = time_of(comm, gpu, lambda reduce=reduce: reduce(x, x))
        except AgreedError as error:
            if last and not seconds:
                raise
            failed[name] = str(error)
            continue
        seconds[name] = max(everyone.allgather_object(own))
    cost = {
        name: time + (0 if candidates[name][0].capturable else UNCAPTURED_S) for name, time in seconds.items()
    }
    return TransportChoice(everyone.broadcast(min(cost, key=cost.get)), x.nbytes, seconds, failed)


def time_of(comm, gpu, reduce):
    """Return the median seconds of a call of `reduce` on this rank, in a graph if it can be captured."""
    with comm.launching():
        reduce()  # warms up; NCCL connects the GPUs at the first call

    def calls():
        for _ in range(CALLS):
            reduce()

    launch = partial(captured(gpu, calls).launch, gpu.stream) if comm.capturable else calls
    start, end, times = gpu.cupy.cuda.Event(), gpu.cupy.cuda.Event(), []
    for _ in range(ROUNDS):
        with comm.launching() if comm.capturable else nullcontext():
            start.record(gpu.stream)
            launch()
            end.record(gpu.stream)
        end.synchronize()
        times.append(gpu.cupy.cuda.get_elapsed_time(start, end) / 1000 / CALLS)
    gpu.stream.synchronize()
    comm.check()
    return median(times)


def warn_of_failures(host, choice):
    """Print a warning on rank 0 for each candidate that failed."""
    if host.all_groups.rank == 0:
        for name, reason in choice.failed.items():
            print(
                f"minitp: warning: --comm auto: {name} failed ({reason}); using {choice.name}",
                file=sys.stderr,
            )
