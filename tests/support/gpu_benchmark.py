"""A copy of benchmarks/gpu/run.py with tasks that take no time; test_gpu_tasks starts it.

    python gpu_benchmark.py FOLDER [OPTIONS OF run.py]

The file and the outputs go to FOLDER. The long tasks print their process id and then wait for WAIT_S seconds;
the measured figure is FIGURE. Both are environment variables.
"""

import os
import sys
from functools import partial
from pathlib import Path

from paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))

import run
from tasks import Task


def python(text):
    return [sys.executable, "-c", text]


def tasks(group):
    wait = f"import os, time; print(os.getpid(), flush=True); time.sleep({os.environ.get('WAIT_S', 0)})"
    figure = f"print('{{\"figure\": {os.environ.get('FIGURE', 'null')}}}')"
    return {
        "checks": [
            Task("tests", python("print('12 passed')"), 20, required=True),
            Task("check, long", python(wait), 20, required=True),
        ],
        "speed": [Task("figure", python(figure), 20), Task("long figure", python(wait), 20, least_s=5)],
        "peers": [Task("peer", python("1/0"), 20, lambda: "no peer here")],
    }[group]


run.GROUPS = {group: partial(tasks, group) for group in run.GROUPS}
run.Results = partial(run.Results, folder=Path(sys.argv.pop(1)))
if __name__ == "__main__":
    sys.exit(run.main())
