"""A check: compare every step of every rank with the oracle and find the first wrong one.

Each rank runs the passes (`passes`) and records its steps in its own file. Then every step gets two errors:

    local    the array compared with the result of the oracle's operation on the inputs that this rank
             recorded (`rank`). A step is blamed for its local error, so a wrong step is not blamed on later
             ones.
    total    the array compared with the oracle's own run from the tokens (`totals`): the accumulated error.
             A step is blamed for it only if all local errors are within their bounds.
"""

import numpy as np

from minitp.check.passes import run_all_passes
from minitp.check.plan import plan_problems
from minitp.check.rank import RankCheck
from minitp.check.replicas import replica_difference
from minitp.check.result import CheckResult
from minitp.check.step_file import StepFile
from minitp.check.totals import Totals
from minitp.errors import MinitpError, RankError, one_line
from minitp.trace.names import BEFORE, BLOCK_TABLE, WEIGHTS, step_names
from minitp.trace.reference import open_oracle


def check_model(source, model, token_ids, decode=0, batch=0, progress=lambda layers: None):
    """Run a prompt through a Model and check every step; all ranks call this and get the same result.

    Parameters
    ----------
    source : ModelSource
    model : Model
    token_ids : list of int
        The prompt.
    decode : int
        The number of tokens to decode after the prompt.
    batch : int
        The number of sequences, made from the prompt, that run through the engine; 0 for none.
    progress : callable
        Function that is called with the number of layers done since its last call. Each layer counts three
        times: for its weights, its local errors and its total errors.
    """
    comm = model.comm
    reference = open_oracle(source)
    problems = plan_problems(reference, source.plan, source.shares)
    if problems:
        return CheckResult([], problems, [list(token_ids)], [], comm.size)
    with np.errstate(all="ignore"):  # the findings report what is not finite
        with comm.agreed():
            step_file = StepFile()
        run = _run_all_passes(model, token_ids, decode, batch, step_file)
        rank = RankCheck(source, reference, model, run, step_file)
        rank.check_weights(progress)
        if rank.check_locally(progress):
            rank.check_bits()
            totals = Totals(reference, comm, run, rank.kinds, model.device.dtype, model.kv_dtype)
            totals.measure(rank.findings, step_file, progress)
        warnings = rank.rounding.warnings(comm)
        difference = replica_difference(comm, step_file)
    by_rank = comm.allgather_object(list(rank.findings.values()))
    findings = in_order([finding for findings in by_rank for finding in findings], source.plan, run.passes)
    return CheckResult(findings, problems, run.sequences, run.passes, comm.size, warnings, difference)


def _run_all_passes(model, token_ids, decode, batch, step_file):
    """Run all passes; if the model fails, raise a RankError that names the last step."""
    try:
        return run_all_passes(model, token_ids, decode, batch, step_file)
    except MinitpError:
        raise
    except Exception as error:
        after = f" after the step {step_file.last}" if step_file.last else ""
        raise RankError(f"rank {model.comm.rank}: the model failed{after}: {one_line(error)}") from error


def in_order(findings, plan, passes):
    """Sort the findings: weights first, then steps in the order of the run; each step by rank."""
    steps = [*BEFORE, BLOCK_TABLE, *(step for step in step_names(plan) if step not in BEFORE)]
    names = [WEIGHTS + name for name in plan.tensors]
    names += [f"{pass_.name}/{step}" for pass_ in passes for step in steps]
    position = {name: number for number, name in enumerate(names)}
    return sorted(findings, key=lambda finding: (position[finding.name], finding.rank))
