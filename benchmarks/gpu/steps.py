"""The steps of a benchmark: processes with a time limit. If one fails, the others go on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from minitp.util.environment import cores

ROOT = Path(__file__).resolve().parents[2]
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
LOOK_S = 0.05
END_S = 5.0  # for a step to end its own processes, once it has been told to


@dataclass(frozen=True)
class Step:
    """A command and how long it may take.

    Attributes
    ----------
    reason : callable
        Returns why the step cannot be run here, or None.
    least_s : float
        The step is not begun with less time than this.
    required : bool
        The step shows that something is right, so without it the whole has failed.
    """

    name: str
    command: list
    limit_s: float
    reason: object = lambda: None
    least_s: float = 1.0
    required: bool = False


class Runner:
    """Runs steps until its time is up or a signal comes.

    Parameters
    ----------
    folder : Path
        Each step's output goes to a file in this folder.
    seconds : float
        The time for all steps together.
    done : callable
        Gets each outcome as soon as there is one, from any thread. An outcome is a dict: name, status (ok,
        failed or skipped), `at` which time of the day it began, seconds, its last line, and that line as JSON
        if it is JSON.

    Attributes
    ----------
    signal : int or None
        The signal that has ended the run.
    """

    def __init__(self, folder, seconds, done):
        self._folder, self._done = folder, done
        self._deadline = time.monotonic() + seconds
        self.signal = None

    def interrupt(self, number, frame=None):
        """End all steps soon. This is a handler of signals."""
        self.signal = number

    def run(self, steps, together=False):
        """Run steps one after another, or as many at a time as there are cores; return their outcomes."""
        if not together or not steps:
            return [self._run(step) for step in steps]
        workers = min(cores(), len(steps))
        threads = dict.fromkeys(THREAD_VARIABLES, str(max(2, cores() // workers)))  # of each step
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(lambda step: self._run(step, threads), steps))

    def _run(self, step, variables=None):
        started, at = time.monotonic(), datetime.now().strftime("%H:%M")
        status, said, result = self._outcome(step, variables or {})
        seconds = round(time.monotonic() - started, 1)
        why = "" if status == "ok" else f": {said}"
        sys.stderr.write(f"{step.name}: {status}, {seconds:.0f} s{why}\n")  # in one piece: steps end together
        outcome = {"name": step.name, "status": status, "at": at, "seconds": seconds}
        outcome |= {"said": said, "result": result}
        self._done(outcome)
        return outcome

    def _outcome(self, step, variables):
        """Return (status, said, result)."""
        reason = step.reason()
        if reason is not None:
            return "skipped", reason, None
        unfinished, left = "failed" if step.required else "skipped", self._deadline - time.monotonic()
        if self.signal is not None:
            return unfinished, "interrupted before it began", None
        if left < step.least_s:
            return unfinished, "no time was left for it", None
        path = self._folder / f"{slug(step.name)}.txt"
        with open(path, "wb") as output:
            process = start(step, output, variables)
            ended = self._wait(process, min(step.limit_s, left))
        if not ended and self.signal is not None:
            return unfinished, "interrupted", None
        if not ended and step.limit_s > left:
            return unfinished, f"stopped after {left:.0f} s: no time was left for it", None
        if not ended:
            return "failed", f"took longer than {step.limit_s:.0f} s", None
        text = path.read_text(errors="replace")
        if process.returncode:
            return "failed", f"exit code {process.returncode}: {last_line(text)}", None
        return "ok", last_line(text), last_object(text)

    def _wait(self, process, limit_s):
        """Return whether the process has ended by itself; if not, it is ended."""
        end = time.monotonic() + limit_s
        while process.poll() is None:
            if self.signal is not None or time.monotonic() > end:
                end_group(process)
                return False
            time.sleep(LOOK_S)
        with suppress(ProcessLookupError):  # what it has left running would disturb the next
            os.killpg(process.pid, signal.SIGKILL)
        return True


def start(step, output, variables):
    """Return the step's process, the leader of a group of its own; it writes everything to `output`."""
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH")]
    variables = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    variables["PYTHONUNBUFFERED"] = "1"  # stdout and stderr in the order in which they were written
    return subprocess.Popen(
        [str(part) for part in step.command],
        cwd=ROOT,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def end_group(process):
    """End a process and its group, politely first: the front of a minitp command then ends its ranks."""
    os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def slug(name):
    """The name as a part of a file's name: `check demo, fused` becomes `check-demo-fused`."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def last_line(text, most=300):
    """The last line that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:most] if lines else ""


def last_object(text):
    """The JSON object that the last line beginning with a brace holds, or None."""
    lines = [line for line in text.splitlines() if line.startswith("{")]
    with suppress(IndexError, ValueError):
        return json.JSONDecoder().raw_decode(lines[-1])[0]
    return None
