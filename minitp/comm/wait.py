"""How a rank waits for others: without keeping a core from them, and not for ever without a word.

A rank that waits looks, pauses, and looks again. After ten seconds it says on stderr for whom it waits. After
a minute rank 0 ends the job: that rank is stopped or stuck, or its host is out of reach.

Only rank 0 gives up, and nobody gives up on rank 0, for it may be late through no fault of its own: whoever
reads its output has paused. Where a phase may take hours (loading, checking, waiting for requests), nobody
gives up.
"""

import os
import sys
import time
from time import perf_counter

from minitp.errors import RankError

SPIN_S = 0.02  # of giving way to others before sleeping
PAUSE_S = 0.0005
LONGEST_PAUSE_S = 0.005  # in a phase that may take hours: a rank that waits takes 0.4% of a core
LATE_S = 10.0
LOST_S = 60.0
LONGEST_LOOK_S = 1.0  # what a look counts at most: the whole job may have been stopped, and go on


class Backoff:
    """One wait of one rank.

    Parameters
    ----------
    me : str
        This rank, as messages name it.
    late : callable
        The names of those that have not come yet, rank 0 left out.
    gives_up : bool
    patient : bool
        It may take hours: asleep from the start, and nobody gives up.
    """

    __slots__ = ("_gives_up", "_last", "_late", "_me", "_patient", "_pause", "_said", "_waited")

    def __init__(self, me, late, gives_up, patient):
        self._me, self._late, self._gives_up, self._patient = me, late, gives_up and not patient, patient
        self._last, self._waited, self._said = perf_counter(), 0.0, False
        self._pause = PAUSE_S

    def pause(self):
        """Between two looks: give way to whoever else wants this core, it may be the rank that is late.

        Raises
        ------
        RankError
            after LOST_S, on a rank that gives up, if others than rank 0 are late.
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
        self._waited += min(now - self._last, LONGEST_LOOK_S)
        self._last = now
        if self._waited > LATE_S and not self._said:
            self._said = True
            if late := self._late():
                # In one piece with its end, for other ranks may say something at this moment.
                say = f"minitp: {self._me} has waited {LATE_S:g} s for {' and '.join(late)}\n"
                print(say, end="", file=sys.stderr, flush=True)
        if self._gives_up and self._waited > LOST_S and (late := self._late()):
            raise RankError(
                f"waited {LOST_S:g} s for {' and '.join(late)}: it, or a rank that it waits for, is stopped "
                "or stuck, or the network is cut"
            )
