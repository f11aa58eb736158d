"""A check: compare every step of every rank with the oracle and find the first wrong one.

Each rank records its steps in its own file while it runs (`passes`). Then every step gets two errors:

    local    the array compared with the result of the oracle's operation on the inputs that this rank
             recorded. A step is blamed for its local error, so a wrong step is not blamed on later ones.
    total    the array compared with the oracle's own run from the tokens: the accumulated error (`totals`).
             It is blamed only if no local error explains it.
"""

import numpy as np

from minitp.check.passes import run_all
from minitp.check.plan import plan_problems
from minitp.check.rank import RankCheck
from minitp.check.result import CheckResult
from minitp.check.step_file import StepFile
from minitp.check.totals import Totals
from minitp.trace.names import BEFORE, BLOCK_TABLE, WEIGHTS, step_names
from minitp.trace.record import Recorder
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
        Function that is called with the number of layers done since the last call, three times per layer in
        all.
    """
    comm = model.comm
    reference = open_oracle(source)
    problems = plan_problems(reference, source.plan)
    if problems:
        return CheckResult([], problems, [list(token_ids)], [], comm.size)
    with np.errstate(all="ignore"):  # the findings report what is not finite
        recording, recorded = _record(model, token_ids, decode, batch)
        rank = RankCheck(source, reference, model, recorded, recording)
        rank.check_weights(progress)
        rank.check_locally(progress)
        rank.check_bits()
        totals = Totals(reference, comm, recording, rank.kinds, model.device.dtype, model.kv_dtype)
        totals.measure(rank.findings, recorded.read, progress)
        warnings = rank.rounding.warnings(comm)
    findings = [finding for found in comm.allgather_object(rank.findings) for finding in found.values()]
    findings = _in_order(findings, source.plan, recording.passes)
    return CheckResult(findings, problems, recording.sequences, recording.passes, comm.size, warnings)


def _record(model, token_ids, decode, batch):
    """Run all passes; return them, and the steps of this rank."""
    with model.comm.agreed():
        recorded = StepFile()
    recorder = Recorder(model.device, None, recorded.write)
    return run_all(model, token_ids, decode, batch, recorder, recorded.write), recorded


def _in_order(findings, plan, passes):
    """Sort the findings: weights first, then steps in the order of the run; each step by rank."""
    names = [WEIGHTS + name for name in plan.tensors]
    for pass_ in passes:
        names += [f"{pass_.name}/{step}" for step in (*BEFORE, BLOCK_TABLE, *step_names(plan)[len(BEFORE) :])]
    position = {name: number for number, name in enumerate(names)}
    return sorted(findings, key=lambda finding: (position[finding.name], finding.rank))
