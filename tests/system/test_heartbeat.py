"""A rank that stands still or stops reading ends its job; one that computes, waits or was paused does not.

A job here is a single process, which runs a few lines of Python with a rank's end of the connection.
"""

import os
import signal
import sys
import threading
import time

import pytest

from minitp.engine.client import StartedRanks
from minitp.engine.options import EngineOptions
from minitp.errors import RankError
from minitp.launch import heartbeat, supervisor
from minitp.launch.supervisor import rank_processes

LIMIT_S = 1
BEGINNING = f"""
import ctypes, os, signal, sys, time
from minitp.launch import heartbeat
from minitp.launch.rank import SupervisorLink
heartbeat.BEAT_S = 0.1
link = SupervisorLink(os.environ["MINITP_SUPERVISOR"])
heartbeat.start_beating(link.send)
LONG = {1.6 * LIMIT_S}
"""
END = "\nlink.send_exit(0)"
LARGE = {"text": "x" * (4 << 20)}  # larger than a socket's buffer


@pytest.fixture(autouse=True)
def _short_limits(monkeypatch):
    monkeypatch.setattr(heartbeat, "CHECK_S", 0.2)
    monkeypatch.setattr(heartbeat, "STILL_LIMIT_S", LIMIT_S)
    monkeypatch.setattr(heartbeat, "ACTIVE_S", 0.03)


def watch(script, before=lambda job: None, beginning=BEGINNING):
    """Run a rank until it ends, calling before(job) at its first message; return its exit code."""
    with rank_processes(1) as job:
        job.on_message = lambda message: before(job)
        job.start([sys.executable, "-c", beginning + script + END])
        return job.watch()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGSTOP)", r"its process is stopped \(state T\)"),
        ("ctypes.PyDLL(None).sleep(60)", r"its process neither answers nor computes \(state S\)"),
    ],
    ids=["stopped", "keeps the lock"],
)
def test_a_rank_that_stands_still_ends_the_job(script, words):
    began = time.monotonic()
    with pytest.raises(RankError, match=rf"rank 0 \(pid \d+\) has stood still for 1 s: {words}"):
        watch(f"print('last words', flush=True); time.sleep(0.3)\n{script}")
    assert time.monotonic() - began < 8


def test_a_rank_that_is_stopped_before_its_first_beat():
    stops = BEGINNING.replace("heartbeat.start_beating", "os.kill(os.getpid(), signal.SIGSTOP) #")
    with pytest.raises(RankError, match=r"rank 0 .* is stopped"):
        watch("", beginning=stops)


@pytest.mark.parametrize(
    "script",
    [
        "time.sleep(LONG)",
        "end = time.monotonic() + LONG\nwhile time.monotonic() < end: pow(3, 100_000)",
        "pow(3, 1 << 23)",  # one operation that keeps the lock
    ],
    ids=["waits", "computes", "computes with the lock"],
)
def test_a_rank_that_works_for_longer_than_the_limit_goes_on(script):
    assert watch(script) == 0


def test_a_rank_that_has_not_begun_to_beat_may_keep_the_lock():
    """A rank may wait for others without letting its own threads run while MPI starts."""
    keeps_the_lock = f"ctypes.PyDLL(None).usleep({1_600_000 * LIMIT_S}) #"
    waits = BEGINNING.replace("heartbeat.start_beating", keeps_the_lock)
    assert watch("", beginning=waits) == 0


def test_the_time_in_which_the_supervisor_was_paused_does_not_count(monkeypatch):
    """Let an hour pass for supervisor and rank, then resume both: the rank has time to show itself."""
    monkeypatch.setattr(heartbeat, "process_state", lambda pid: ("T", 0.0))
    pulse = heartbeat.Pulse(1)
    assert pulse.check() is None, "one check counts CHECK_S, however late it is"
    monkeypatch.setattr(heartbeat, "process_state", lambda pid: ("S", 0.0))
    assert [pulse.check() for _ in range(10)] == [None] * 10


def test_a_process_that_waits_for_a_core_is_not_judged(monkeypatch):
    monkeypatch.setattr(heartbeat, "process_state", lambda pid: ("R", 0.0))
    pulse = heartbeat.Pulse(1)
    pulse.beating = True
    assert [pulse.check() for _ in range(20)] == [None] * 20


def test_a_supervisor_that_was_paused_still_waits_for_its_ranks(monkeypatch):
    """Pause it for longer than the limit, by a slow `select`, before the rank connects."""
    monkeypatch.setattr(supervisor, "START_LIMIT_S", 2)
    late = BEGINNING.replace("link =", "time.sleep(2.6)\nlink =")
    with rank_processes(1) as job:
        select = job.selector.select

        def pauses(timeout):
            job.selector.select = select
            time.sleep(2.3)
            return []

        job.selector.select = pauses
        job.start([sys.executable, "-c", late + END])
        assert job.watch() == 0


def pause_then(rank_does):
    """Return a script that announces itself, pauses its process, and then does something."""
    return f"link.send({{}})\nos.kill(os.getpid(), signal.SIGSTOP)\n{rank_does}"


def test_a_message_reaches_a_rank_that_was_paused_in_the_middle_of_it():
    """Pause the rank for less than the limit while a large message and another one are sent."""
    sent = []

    def send(job):
        begun = time.monotonic()
        job.send(LARGE)
        job.send({"last": True})
        sent.append(time.monotonic() - begun)
        threading.Timer(0.6 * LIMIT_S, os.kill, (job.ranks[0].pid, signal.SIGCONT)).start()

    reads = "assert len(link.inbox.get()['text']) == 4 << 20 and link.inbox.get() == {'last': True}"
    assert watch(pause_then(reads), send) == 0
    assert sent[0] < 0.3, "`send` does not wait for the rank"


def test_a_message_that_cannot_be_sent_ends_the_job():
    with pytest.raises(RankError, match=r"rank 0 .* is stopped"):
        watch(pause_then(""), lambda job: job.send(LARGE))


def test_a_rank_that_cannot_read_a_message_ends_with_a_reason():
    with pytest.raises(RankError, match=r"rank 0 failed: reading a message: JSONDecodeError: .*"):
        watch("link.send({})\ntime.sleep(60)", lambda job: job.outbox.put(b"half a li\n"))


def test_an_error_in_a_callback_ends_the_job_and_is_reported():
    """Let the progress bar fail, as it does if stderr is closed: no caller waits forever.

    The rank has been ended by then, so that one started again has the memory to itself.
    """

    def on_loading(done, total):
        raise BrokenPipeError("stderr is closed")

    def on_end(error):
        ended.append((error, ranks._job.leader.returncode))

    ended = []
    sends = "link.send({'loading': 1, 'of': 2})\ntime.sleep(60)"
    worker = [sys.executable, "-c", BEGINNING + sends]
    ranks = StartedRanks(EngineOptions(), 1, worker, on_loading=on_loading, on_end=on_end)
    assert ranks.started.wait(10)
    ranks.close()
    assert str(ranks.error) == "the supervisor failed: BrokenPipeError: stderr is closed"
    assert ended == [(ranks.error, -signal.SIGTERM)]
