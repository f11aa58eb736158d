"""Detect a rank that stands still, although its process exists and its connection is open.

Once its communicator is ready, every rank sends its supervisor a beat every two seconds, from a separate
thread. Beats continue while the rank computes, however long that takes, and while it waits. They end if the
process is stopped, or if a call keeps the interpreter's lock and does not return.

A missing beat alone proves nothing: a computation may keep the lock, too, and a loaded machine may not let
the process run. A rank therefore stands still only if there was no other sign of life for ten seconds either:
no message and next to no CPU time. A process that could run, waits for a disk, or is held by a debugger is
not judged.
Until its first beat, while MPI starts, a rank is judged only if it is stopped (SIGSTOP).

The supervisor checks every second and counts each check as one second, so a machine that was suspended, or a
supervisor that was paused itself, ends no job. The state and the CPU time of a process come from /proc;
without it (macOS) no rank is judged.
"""

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

BEAT_S = 2.0  # time between two beats
CHECK_S = 1.0  # time between two checks
STILL_LIMIT_S = 10.0  # time without a sign of life after which a rank stands still
ACTIVE_S = 0.1  # CPU time that is a sign of life; threads that wait for the interpreter's lock use less
STOPPED, NOT_JUDGED = "T", "RtDXZ"  # states: stopped by a signal; can run, debugger, disk, dead


def start_beating(send):
    """Call send({"beat": true}) every BEAT_S in a daemon thread."""

    def beat():
        with suppress(OSError):  # the supervisor has died, which ends this process, too
            while True:
                send({"beat": True})
                time.sleep(BEAT_S)

    threading.Thread(target=beat, name="minitp: heartbeat", daemon=True).start()


class Pulse:
    """The signs of life of one rank, as its supervisor sees them.

    Attributes
    ----------
    heard : bool
        Set by the supervisor when a message arrives.
    beating : bool
        Set by the supervisor when the first beat arrives.
    """

    def __init__(self, pid):
        self.pid, self.heard, self.beating = pid, False, False
        self._still_s = self._cpu_s = 0.0

    def check(self):
        """Count CHECK_S unless there was a sign of life; return why the rank stands still, or None."""
        state, cpu_s = process_state(self.pid)
        judged = state == STOPPED or (self.beating and state not in NOT_JUDGED)
        if self.heard or not judged or cpu_s - self._cpu_s >= ACTIVE_S:
            self.heard, self._still_s, self._cpu_s = False, 0.0, cpu_s
        else:
            self._still_s += CHECK_S
        if self._still_s < STILL_LIMIT_S:
            return None
        what = "is stopped" if state == STOPPED else "neither answers nor computes"
        return f"has stood still for {STILL_LIMIT_S:g} s: its process {what} (state {state})"


def process_state(pid):
    """Return the state letter of a process and the CPU seconds that it has used; ("X", 0) if unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "X", 0.0
    return fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
