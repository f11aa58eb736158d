"""Run `check` on random models of every family, none of which is wrong, and print each that is blamed.

    export PYTHONPATH=tests
    python tests/support/check_random_models.py 2000                  some minutes on one core
    python tests/support/check_random_models.py 500 --path fused      the kernels, on the stand-in's GPUs
    python tests/support/check_random_models.py --seed 0 --only 17 --keep /tmp/model
    python tests/support/check_random_models.py 500 --shares          also how much of the bounds is used

The exit code is 1 if anything was blamed. `--only` repeats one run, and `--keep` leaves its model in a
directory, for `minitp check --model`. A run that overflows its dtype is counted, and is no false alarm.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from on_gpu import model_on_gpu, run_on_gpus, stand_in
from one_core import run_threads
from random_models import draw_run

from minitp.check.run import check_model
from minitp.device import open_device
from minitp.load import load_model
from minitp.loading.source import open_model


def check(run, directory, path=None):
    """Return the CheckResult of a Run whose model is in `directory`; `path` is one of a GPU's, or None."""
    source, options = open_model(str(directory), run.tp), {"kv_dtype": run.kv_dtype}

    def rank(comm):
        if path is None:
            model = load_model(source, comm, open_device(run.dtype), **options)
        else:
            model = model_on_gpu(directory, comm, run.dtype, path=path, **options)
        return check_model(source, model, run.token_ids, run.decode, run.batch)

    return (run_threads if path is None else run_on_gpus)(run.tp, rank)[0]


def check_number(seed, number, path=None, keep=None):
    """Draw a run and check it; return the Run and its CheckResult."""
    run = draw_run(seed, number, on_gpu=path is not None)
    with tempfile.TemporaryDirectory() as folder:
        return run, check(run, run.write(keep or Path(folder) / "model"), path)


def alarms(result):
    """Return a line for each blamed finding, or [] if there is none or the run has overflowed.

    What follows an infinite number may be infinite or NaN too, and is not of interest.
    """
    lines = []
    for found in result.blamed():
        if found.local is not None and overflowed(found):
            return []
        lines.append(f"{found.name} rank {found.rank}: {error_of(found)} {found.note}".rstrip())
    return [*lines, *(f"plan, rank {rank}: {text}" for rank, text in result.problems)]


def overflowed(found):
    """Return whether a finding's worst element is infinite although a finite number was expected."""
    return any(np.isinf(value) and np.isfinite(expected) for _, value, expected in found.local.worst)


def error_of(found):
    """Return a finding's error in words, the total one if the local one is within its bounds."""
    if found.ok:
        return f"total {found.total.relative / found.total_bound:.1%} of its bound, {found.total}"
    return "" if found.local is None else f"{found.ratio:.1%} of its bound, {found.local}"


class Shares:
    """The largest shares of the bounds that correct runs use, by group of runs and by step."""

    def __init__(self):
        self.local, self.total = defaultdict(list), defaultdict(list)
        self.unbounded, self.runs = Counter(), Counter()  # by dtype; the logits have no total bound

    def add(self, run, result):
        """Add the CheckResult of a Run."""
        local, total = defaultdict(float), defaultdict(float)
        for found in result.findings:
            if found.pass_name == "weights":
                continue
            share = found.total.relative / found.total_bound if found.total_bound else 0.0
            for largest, value in ((local, found.ratio), (total, share)):
                for group in ("all", run.dtype, run.fields["model_type"], run.weights, found.step):
                    largest[group] = max(largest[group], value)
        self.runs[run.dtype] += 1
        self.unbounded[run.dtype] += any(
            found.step == "logits" and found.total_bound is None for found in result.findings
        )
        for all_runs, largest in ((self.local, local), (self.total, total)):
            for group, value in largest.items():
                all_runs[group].append(value)

    def __str__(self):
        unbounded = (f"{dtype} {self.unbounded[dtype]} of {count}" for dtype, count in self.runs.items())
        lines = [f"runs whose logits have no bound for the total error: {', '.join(unbounded)}"]
        for what, shares in (("local", self.local), ("total", self.total)):
            lines += ["", f"largest share of a {what} bound   runs   median      90%      99%     max"]
            for group, values in shares.items():
                quantiles = np.quantile(values, (0.5, 0.9, 0.99, 1))
                lines.append(f"{group:30} {len(values):6}" + "".join(f"{q:9.1%}" for q in quantiles))
        return "\n".join(lines)


def main(args):
    """Run the command, and return its exit code."""
    shares, counts, started = Shares(), Counter(), time.time()
    numbers = range(args.count) if args.only is None else [args.only]
    for number in numbers:
        run = draw_run(args.seed, number, on_gpu=args.path is not None)
        try:
            result = check_number(args.seed, number, args.path, args.keep)[1]
        except Exception as error:
            counts["failed"] += 1
            lines = [f"{type(error).__name__}: {error}"]
        else:
            lines = alarms(result)
            counts["blamed" if lines else "right" if result.ok else "overflowed"] += 1
            counts["with warnings"] += bool(result.warnings)
            if result.ok:
                shares.add(run, result)
            if args.only is not None:
                lines += result.warnings
        if lines or args.only is not None:
            print(f"--seed {args.seed} --only {number}: {run}", *lines, sep="\n    ", flush=True)
    print(f"{len(numbers)} runs in {time.time() - started:.0f} s: {dict(counts)}")
    if args.shares:
        print(shares)
    return 1 if counts["blamed"] or counts["failed"] else 0


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=100, help="number of runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of the only run to make")
    parser.add_argument("--path", choices=("explicit", "fused"), help="run on the GPUs of the stand-in")
    parser.add_argument("--shares", action="store_true", help="print the largest shares of the bounds")
    parser.add_argument("--keep", type=Path, help="directory in which to leave the model of --only")
    args = parser.parse_args()
    if args.keep is not None and args.only is None:
        parser.error("--keep needs --only")
    return args


if __name__ == "__main__":
    args = arguments()
    if args.path is None:
        sys.exit(main(args))
    with stand_in():
        sys.exit(main(args))
