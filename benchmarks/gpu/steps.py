"""The steps of a benchmark: processes with a time limit. If one fails, the others are still run."""

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
END_S = 5.0  # for a step to end its own processes after SIGTERM


@dataclass(frozen=True)
class Step:
    """A command with a time limit.

    Attributes
    ----------
    reason : callable
        Returns why the step cannot be run on this machine, or None.
    least_s : float
        The step is not started if less time than this is left.
    required : bool
        The step is a check: if it is interrupted or time runs out, it counts as failed, not as skipped.
    """

    name: str
    command: list
    limit_s: float
    reason: object = lambda: None
    least_s: float = 1.0
    required: bool = False


class Runner:
    """A runner of steps that stops when its time is up or when it gets a signal.

    Parameters
    ----------
    folder : Path
        Each step's output goes to a file in this folder.
    seconds : float
        The time for all steps together.
    done : callable
        Called with each outcome as soon as there is one, from any thread. An outcome is a dict with the keys
        name, status (ok, failed or skipped), at (the time of day at which it started), seconds, said (its
        last line of output) and result (its last JSON object, or None).

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
        """End all steps soon; a signal handler."""
        self.signal = number

    def run(self, steps, together=False):
        """Run steps one after another, or in parallel, one per core; return their outcomes."""
        if not together or not steps:
            return [self._run(step) for step in steps]
        workers = min(cores(), len(steps))
        threads = dict.fromkeys(THREAD_VARIABLES, str(max(2, cores() // workers)))  # per step
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(lambda step: self._run(step, threads), steps))

    def _run(self, step, variables=None):
        started, at = time.monotonic(), datetime.now().strftime("%H:%M")
        status, said, result = self._outcome(step, variables or {})
        seconds = round(time.monotonic() - started, 1)
        why = "" if status == "ok" else f": {said}"
        sys.stderr.write(f"{step.name}: {status}, {seconds:.0f} s{why}\n")  # in one write: steps end together
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
        """Wait for the process and end it after the time limit; return whether it ended by itself."""
        end = time.monotonic() + limit_s
        while process.poll() is None:
            if self.signal is not None or time.monotonic() > end:
                end_group(process)
                return False
            time.sleep(LOOK_S)
        with suppress(ProcessLookupError):  # leftover processes would disturb the next step
            os.killpg(process.pid, signal.SIGKILL)
        return True


def start(step, output, variables):
    """Start the step's process in a new process group; all its output goes to `output`."""
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH")]
    variables = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    variables["PYTHONUNBUFFERED"] = "1"  # keeps stdout and stderr in order
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
    """End a process and its group, first with SIGTERM, on which the launcher of minitp ends its ranks."""
    os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def slug(name):
    """Return a name in a form fit for file names: `check demo, fused` becomes `check-demo-fused`."""
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
