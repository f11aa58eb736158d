"""The tasks of a benchmark: processes with a time limit. If one fails, the others are still run."""

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
END_S = 5.0  # time for a task to end its own processes after SIGTERM


@dataclass(frozen=True)
class Task:
    """A command with a time limit.

    Attributes
    ----------
    reason : callable
        A function that returns why the task cannot run on this machine, or None.
    least_s : float
        Minimum time that must be left for the task to start.
    required : bool
        Whether the task is a check: if it is interrupted or time runs out, it counts as failed, not skipped.
    """

    name: str
    command: list
    limit_s: float
    reason: object = lambda: None
    least_s: float = 1.0
    required: bool = False


class Runner:
    """A runner of tasks that stops when its time is up or when it gets a signal.

    Parameters
    ----------
    folder : Path
        Each task's output goes to a file in this folder.
    seconds : float
        Time limit for all tasks together.
    done : callable
        A function called with each outcome as soon as it is known, from any thread. An outcome is a dict
        with the keys name, status (ok, failed or skipped), at (the time of day when the task started),
        seconds, said (its last line of output) and result (its last JSON object, or None).

    Attributes
    ----------
    signal : int or None
        The signal that ended the run.
    """

    def __init__(self, folder, seconds, done):
        self._folder, self._done = folder, done
        self._deadline = time.monotonic() + seconds
        self.signal = None

    def interrupt(self, number, frame=None):
        """Handle a signal: end all tasks soon."""
        self.signal = number

    def run(self, tasks, together=False):
        """Run tasks one after another, or in parallel, one per core; return their outcomes."""
        if not together or not tasks:
            return [self._run(task) for task in tasks]
        workers = min(cores(), len(tasks))
        threads = dict.fromkeys(THREAD_VARIABLES, str(max(2, cores() // workers)))  # per task
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(lambda task: self._run(task, threads), tasks))

    def _run(self, task, variables=None):
        started, at = time.monotonic(), datetime.now().strftime("%H:%M")
        status, said, result = self._outcome(task, variables or {})
        seconds = round(time.monotonic() - started, 1)
        why = "" if status == "ok" else f": {said}"
        # A single write, because tasks may end at the same time.
        sys.stderr.write(f"{task.name}: {status}, {seconds:.0f} s{why}\n")
        outcome = {"name": task.name, "status": status, "at": at, "seconds": seconds}
        outcome |= {"said": said, "result": result}
        self._done(outcome)
        return outcome

    def _outcome(self, task, variables):
        """Return (status, said, result)."""
        reason = task.reason()
        if reason is not None:
            return "skipped", reason, None
        unfinished, left = "failed" if task.required else "skipped", self._deadline - time.monotonic()
        if self.signal is not None:
            return unfinished, "interrupted before it began", None
        if left < task.least_s:
            return unfinished, "no time was left for it", None
        path = self._folder / f"{slug(task.name)}.txt"
        with open(path, "wb") as output:
            process = start(task, output, variables)
            ended = self._wait(process, min(task.limit_s, left))
        if not ended and self.signal is not None:
            return unfinished, "interrupted", None
        if not ended and task.limit_s > left:
            return unfinished, f"stopped after {left:.0f} s: no time was left for it", None
        if not ended:
            return "failed", f"took longer than {task.limit_s:.0f} s", None
        text = path.read_text(errors="replace")
        if process.returncode:
            return "failed", f"exit code {process.returncode}: {last_line(text)}", None
        return "ok", last_line(text), last_object(text)

    def _wait(self, process, limit_s):
        """Wait for the process and end it after the time limit; return whether it ended by itself."""
        end = time.monotonic() + limit_s
        while process.poll() is None:
            if self.signal is not None or time.monotonic() > end:
                end_group(process)
                return False
            time.sleep(LOOK_S)
        with suppress(ProcessLookupError):  # leftover processes would disturb the next task
            os.killpg(process.pid, signal.SIGKILL)
        return True


def start(task, output, variables):
    """Start the task's process in a new process group; all its output goes to `output`."""
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH")]
    variables = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    variables["PYTHONUNBUFFERED"] = "1"  # keeps stdout and stderr in order
    return subprocess.Popen(
        [str(part) for part in task.command],
        cwd=ROOT,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def end_group(process):
    """End a process and its group, first with SIGTERM, at which the minitp launcher ends its ranks."""
    os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def slug(name):
    """Return a name in a form for file names: `check demo, fused` becomes `check-demo-fused`."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def last_line(text, most=300):
    """Return the last line that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:most] if lines else ""


def last_object(text):
    """Return the JSON object in the last line that starts with a brace, or None."""
    lines = [line for line in text.splitlines() if line.startswith("{")]
    with suppress(IndexError, ValueError):
        return json.JSONDecoder().raw_decode(lines[-1])[0]
    return None
