"""Ranks as threads that share one core: with tiny arrays, this takes half the CPU time of two cores."""

import os
from contextlib import contextmanager

from minitp import comm


def run_threads(size, function):
    """Return the result of minitp's run_threads, whose threads all run on one core.

    NumPy releases the interpreter's lock for each operation. With tiny arrays on two cores, most of the time
    then goes into handing the lock from one core to the other.
    """
    with one_core():
        return comm.run_threads(size, function)


@contextmanager
def one_core():
    """Run this thread and those that it starts on one core, a different one for each worker of xdist."""
    if not hasattr(os, "sched_setaffinity"):  # not Linux
        yield
        return
    cores = sorted(os.sched_getaffinity(0))
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    number = int(worker.removeprefix("gw")) if worker.startswith("gw") else os.getpid()
    os.sched_setaffinity(0, {cores[number % len(cores)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
