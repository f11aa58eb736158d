"""Test, check and measure minitp on this machine's GPU, in less than eight minutes.

    ./run.sh gpu [--only checks|speed|peers] [--budget SECONDS]

There are three groups of tasks. The checks run in parallel, one per core: the tests that need a GPU, the
tests of the kernels (here on the GPU), `check` of every family, of the demo model and of two layers in
Mistral 7B's shapes, NCCL with one rank, and four ranks that share the GPU. Then the speed of minitp is
measured, one task at a time: decode passes and their kernels in Mistral 7B's shapes, one rank of TP=4 alone,
prompts, many requests in the engine and over HTTP, and loading from a file of 14 GB. The last group is the
peers: transformers on the same GPU. `--only` runs one of the groups. Each task is a process with a time
limit; if it fails, the others are still run.

Tables are printed at the end, also after Ctrl-C or SIGTERM; the last one has each figure as a share of its
limit, measured in the same run, next to the goal (goals.py). benchmarks/results/<gpu>-<date>.json has all
tasks of the day, and the folder of the same name has their output. table.py prints the tables of such a file.

    MINITP_PYTHON=python3   use a Python that has all packages; nothing is installed or downloaded
    MINITP_MPICH=WHEEL      use mpirun from an MPICH wheel or a folder; see docs/troubleshooting.md
"""

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from datetime import date

from commands import FOLDER, checks, measurements, peers
from mpich import VARIABLE, use_mpich
from results import Results
from table import table
from tasks import Runner

from minitp.cuda.gpu import find_cupy
from minitp.errors import MinitpError

BUDGET_S = 465.0
GROUPS = {"checks": checks, "speed": measurements, "peers": peers}
PACKAGES = ("numpy", "ml_dtypes", "torch", "transformers", "mpi4py")


def main():
    """Run the tasks and return the exit code.

    It is 1 if a task failed, and 128 + the signal's number if a signal ended the run.
    """
    args = arguments().parse_args()
    with tempfile.TemporaryDirectory(prefix="minitp-gpu-") as folder:
        try:
            if os.environ.get(VARIABLE):
                use_mpich(os.environ[VARIABLE], folder)
            facts = surroundings(find_cupy())
        except MinitpError as error:
            print(f"minitp: {error}", file=sys.stderr)
            return error.exit_code
        groups = {name: tasks() for name, tasks in GROUPS.items()}
        results = Results(facts, [task.name for tasks in groups.values() for task in tasks])
        runner = Runner(results.outputs, args.budget, results.add)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, runner.interrupt)
        outcomes = []
        try:
            for name in [args.only] if args.only else groups:
                outcomes += runner.run(groups[name], together=name == "checks")
        finally:
            shutil.rmtree(FOLDER, ignore_errors=True)
    written = f"written: {os.path.relpath(results.path)}, output: {os.path.relpath(results.outputs)}/"
    print("\n".join(["", *table(facts, results.outcomes()), written]))
    if runner.signal is not None:
        return 128 + runner.signal
    return 1 if any(one["status"] == "failed" for one in outcomes) else 0


def arguments():
    """Return the command-line parser."""
    parser = argparse.ArgumentParser(
        prog="./run.sh gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", choices=GROUPS, help="run only this group of tasks")
    parser.add_argument(
        "--budget",
        type=seconds,
        default=BUDGET_S,
        metavar="SECONDS",
        help=f"time for all tasks together; tasks that do not fit are skipped; default {BUDGET_S:g}",
    )
    return parser


def seconds(text):
    """Parse a positive, finite number."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise ValueError(text)
    return number


def surroundings(cupy):
    """Return the machine, the versions of the packages, and the date."""
    runtime, versions = cupy.cuda.runtime, {}
    for name in PACKAGES:
        if importlib.util.find_spec(name) is not None:
            versions[name] = importlib.metadata.version(name)
    return {
        "gpu": runtime.getDeviceProperties(0)["name"].decode(),
        "gpus": runtime.getDeviceCount(),
        "cuda_driver": runtime.driverGetVersion(),
        "cuda_runtime": runtime.runtimeGetVersion(),
        "python": sys.version.split()[0],
        "versions": {"cupy": cupy.__version__, **versions},
        "date": date.today().isoformat(),
    }


if __name__ == "__main__":
    sys.exit(main())
