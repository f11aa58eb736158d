"""Steps of a benchmark: processes with a time limit, of which one that fails does not stop the others."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Step:
    """A command and how long it may take.

    Attributes
    ----------
    reason : callable
        Why it cannot be run here, or None.
    """

    name: str
    command: list
    limit_s: float
    reason: object = lambda: None


def run_group(steps, deadline, together=False):
    """The outcomes of steps, one after another or at the same time; what is left at `deadline` is not run."""
    if not together:
        return [run_step(step, deadline) for step in steps]
    threads = max(2, (os.cpu_count() or 1) // len(steps))  # of each: they share the cores
    extra = dict.fromkeys(THREAD_VARIABLES, str(threads))
    with ThreadPoolExecutor(len(steps)) as pool:
        return list(pool.map(lambda step: run_step(step, deadline, extra), steps))


def run_step(step, deadline, extra=None):
    """An outcome: name, status (ok, failed or skipped), seconds, its last line, and that as JSON if it is."""
    started = time.monotonic()
    status, said, result = outcome(step, deadline, extra or {})
    seconds = time.monotonic() - started
    print(f"{step.name}: {status}, {seconds:.0f} s{': ' + said if status != 'ok' else ''}", file=sys.stderr)
    return {"name": step.name, "status": status, "seconds": round(seconds, 1), "said": said, "result": result}


def outcome(step, deadline, extra):
    """(status, said, result)"""
    reason = step.reason()
    if reason is not None:
        return "skipped", reason, None
    limit = min(step.limit_s, deadline - time.monotonic())
    if limit <= 1:
        return "failed", "no time was left for it", None
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]
    environment = {**os.environ, **extra, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    process = subprocess.Popen(
        [str(part) for part in step.command],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, error = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # a front ends its ranks then
        try:
            process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        return "failed", f"took longer than {limit:.0f} s", None
    if process.returncode:
        return "failed", f"exit code {process.returncode}: {last_words(error) or last_words(out)}", None
    return "ok", last_words(out), parsed(out)


def last_words(text, most=300):
    """The last line that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:most] if lines else ""


def parsed(text):
    """The object in the last line, if there is one."""
    lines = text.splitlines()
    if not lines or not lines[-1].startswith("{"):
        return None
    return json.loads(lines[-1])
