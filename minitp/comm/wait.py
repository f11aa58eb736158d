"""Wait for other ranks with a time limit, and without occupying a core that they need.

A waiting rank checks, pauses, and checks again. After ten seconds it reports on stderr which ranks it is
waiting for. After a minute rank 0 ends the job, because the late rank has stopped or hung, or its host cannot
be reached.

Only rank 0 gives up. The other ranks wait for it without a limit, because it may be late only because the
program that reads its output has paused. In a phase that may take hours (loading, checking, waiting for
requests) no rank gives up.
"""

import os
import sys
import time
from time import perf_counter

from minitp.errors import RankError

SPIN_S = 0.02  # time to yield the core in a loop before sleeping
PAUSE_S = 0.0005
LONGEST_PAUSE_S = 0.005  # longest sleep in a phase that may take hours; it uses 0.4% of a core
LATE_S = 10.0  # waiting time after which a rank reports which ranks are late
LOST_S = 60.0  # waiting time after which rank 0 gives up
LONGEST_CHECK_S = 1.0  # maximum time counted between two checks, in case the job was suspended


class Backoff:
    """The state of one wait of one rank.

    Parameters
    ----------
    name : str
        The name of this rank in messages.
    late : callable
        A function that returns the names of the ranks that are still missing, except rank 0.
    gives_up : bool
        True if this rank ends the job after LOST_S.
    patient : bool
        True if the wait may take hours: sleep from the start, and never give up.
    """

    __slots__ = ("_gives_up", "_last", "_late", "_name", "_patient", "_pause", "_reported", "_waited")

    def __init__(self, name, late, gives_up, patient):
        self._name, self._late, self._gives_up, self._patient = name, late, gives_up and not patient, patient
        self._last, self._waited, self._reported = perf_counter(), 0.0, False
        self._pause = PAUSE_S

    def pause(self):
        """Pause between two checks, and leave the core to other processes, one of which may be the late rank.

        Raises
        ------
        RankError
            After LOST_S, on a rank that gives up, if a rank other than rank 0 is late.
        """
        self._count()
        if self._patient:
            self._pause = min(LONGEST_PAUSE_S, 1.01 * self._pause)
            time.sleep(self._pause)
        elif self._waited < SPIN_S:
            os.sched_yield()
        else:
            time.sleep(PAUSE_S)

    def _count(self):
        now = perf_counter()
        self._waited += min(now - self._last, LONGEST_CHECK_S)
        self._last = now
        if self._waited > LATE_S and not self._reported:
            self._reported = True
            if late := self._late():
                # One write with the newline, because other ranks may write at the same time.
                line = f"minitp: {self._name} has waited {LATE_S:g} s for {' and '.join(late)}\n"
                print(line, end="", file=sys.stderr, flush=True)
        if self._gives_up and self._waited > LOST_S and (late := self._late()):
            any_of_them = "it" if len(late) == 1 else "one of them"
            raise RankError(
                f"waited {LOST_S:g} s for {' and '.join(late)}: {any_of_them}, or a rank that it waits for, "
                "has stopped or hung, or the network is down"
            )
