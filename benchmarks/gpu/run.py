"""Test, check and measure minitp on this machine's GPU, in less than eight minutes.

    ./run.sh gpu [--only checks|speed|peers] [--budget SECONDS]

First come the checks, as many at a time as there are cores: the tests that need a GPU, the tests of kernels
run there, `check` of every family, of the demo model and of two layers in Mistral 7B's shapes, NCCL with one
rank, four ranks that share the GPU. Then minitp's speed, one thing at a time: decoding and a prompt in
Mistral 7B's shapes, one rank's share of TP=4 alone, loading from a file. Last the peers: transformers on the
same card. `--only` runs one of the three. Each step is a process with a time limit; if it fails, the others
go on.

A table comes last, after Ctrl-C or SIGTERM as well. benchmarks/results/<gpu>-<date>.json has all steps of the
day, and the folder of the same name has what each of them wrote.

    MINITP_PYTHON=python3   a Python that has all packages: nothing is installed or fetched
    MINITP_MPICH=WHEEL      mpirun from an mpich wheel, or from a folder; see docs/troubleshooting.md
"""

import argparse
import importlib.metadata
import importlib.util
import os
import signal
import sys
import tempfile
from datetime import date

from commands import checks, measurements, peers
from mpich import VARIABLE, use_mpich
from results import Results
from steps import Runner
from table import table

from minitp.cuda.gpu import find_cupy
from minitp.errors import MinitpError

BUDGET_S = 465.0
GROUPS = {"checks": checks, "speed": measurements, "peers": peers}
PACKAGES = ("numpy", "ml_dtypes", "torch", "transformers", "mpi4py")


def main():
    """Run the steps.

    Returns 1 if one of them failed, and 128 + the number of the signal if one has ended the run.
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
        groups = {name: steps() for name, steps in GROUPS.items()}
        results = Results(facts, [step.name for steps in groups.values() for step in steps])
        runner = Runner(results.outputs, args.budget, results.add)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, runner.interrupt)
        outcomes = []
        for name in [args.only] if args.only else groups:
            outcomes += runner.run(groups[name], together=name == "checks")
    written = f"written: {os.path.relpath(results.path)}, output: {os.path.relpath(results.outputs)}/"
    print("\n".join(["", *table(facts, results.outcomes()), written]))
    if runner.signal is not None:
        return 128 + runner.signal
    return 1 if any(one["status"] == "failed" for one in outcomes) else 0


def arguments():
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="./run.sh gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", choices=GROUPS, help="one of the three instead of all")
    parser.add_argument(
        "--budget",
        type=seconds,
        default=BUDGET_S,
        metavar="SECONDS",
        help=f"for all steps together; what comes too late is not run; default {BUDGET_S:g}",
    )
    return parser


def seconds(text):
    """Return the number in a text; it must be above 0."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise ValueError(text)
    return number


def surroundings(cupy):
    """Return the machine and the versions on which all this runs, and the day."""
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
