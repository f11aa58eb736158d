"""Holding every step of every rank against the oracle, to find the first wrong one.

Each rank records its own steps in a file of its own while it runs. Then every step gets two errors:

    local    the oracle's operation on the inputs that this rank really had, against its output. A step is
             blamed for this one alone, so what follows from a wrong step is not blamed with it.
    total    the oracle's own run from the tokens, against the output: how far the whole has come to be off.

Beside these: what all ranks should hold alike has the same bits, partial sums add up to what the all-reduce
gave, the cache is what earlier passes put into it, each weight is its slice of the checkpoint, and the plan
covers the model (`check.plan`).
"""

import hashlib
import tempfile
from itertools import groupby
from pathlib import Path

import numpy as np
from safetensors import safe_open

from minitp.check.difference import measure
from minitp.check.plan import plan_problems
from minitp.check.replay import LocalCheck
from minitp.check.result import CheckResult, Finding
from minitp.check.sums import sums_of
from minitp.check.tolerance import Unseen
from minitp.loading.safetensors_writer import TensorWriter
from minitp.loading.weights import named_slices
from minitp.trace.names import FLOAT32, WEIGHTS, full_name, kinds, split_name, step_names
from minitp.trace.record import Recorder, run_passes
from minitp.trace.reference import open_oracle, oracle_steps


def check_model(source, model, token_ids, passes, progress=lambda layers: None):
    """Run a prompt through a Model and check it; every rank calls this, and all get the same CheckResult.

    Parameters
    ----------
    source : ModelSource
    model : Model
    token_ids : list of int
    passes : list of (name, start, stop)
        From `trace.record.passes_of`.
    progress : callable
        Gets the number of layers done since the last call; twice as many in all as the model has.
    """
    comm = model.comm
    reference = open_oracle(source)
    problems = plan_problems(reference, source.plan)
    if problems:
        return CheckResult([], problems, list(token_ids), passes, comm.size)
    with np.errstate(all="ignore"):  # the findings say what is not finite
        ids, recorded = _record(model, token_ids, passes)
        host = model.device.to_host
        weights = {name: host(array) for name, array in named_slices(model.weights, source.plan, comm.rank)}
        rank = _Rank(source, reference, model, weights, recorded, ids, passes)
        rank.check_weights()
        rank.check_locally(progress)
        rank.check_bits()
        rank.check_totally(progress)
    findings = [finding for mine in comm.exchange(rank.findings) for finding in mine.values()]
    return CheckResult(_in_order(findings, source.plan, passes), problems, ids, passes, comm.size)


def _record(model, token_ids, passes):
    """Run the passes; return all tokens that went in, and an open file with all steps of this rank."""
    names = [f"{name}/{step}" for name, _, _ in passes for step in step_names(model.plan)]
    with tempfile.TemporaryDirectory(prefix="minitp-check-") as folder:
        path = Path(folder) / "steps.safetensors"
        with TensorWriter(path, names, metadata={}) as file:
            ids = run_passes(model, token_ids, passes, Recorder(model.device, set(names), file.write))
        # The mapping outlives the file's name, so a killed rank leaves nothing from here on.
        with model.comm.agreed():
            return ids, safe_open(path, framework="np")


class _Rank:
    """What one rank finds, by full name."""

    def __init__(self, source, reference, model, weights, recorded, token_ids, passes):
        self.plan, self.comm, self.reference = source.plan, model.comm, reference
        self.fused, self.dtype, self.sums = model.fused, model.device.dtype, sums_of(model.device)
        self.names, self.unseen = set(recorded.keys()), {}  # full name -> Unseen, of steps that are fused
        self.weights, self.recorded = weights, recorded
        self.token_ids, self.passes = token_ids, passes
        self.kinds = kinds(source.plan, source.config.head_dim)
        self.findings = {}
        self.bits = []  # (full name, hash of what it came from, hash of it) of what all ranks hold alike

    def had(self, pass_name, layer, step):
        """This rank's array of a step; Unseen for one inside a fused operation."""
        name = full_name(pass_name, layer, step)
        return self.unseen[name] if name in self.unseen else self.recorded.get_tensor(name)

    def check_weights(self):
        """Each slice against the checkpoint, which the oracle reads by itself; rounded to the dtype alike."""
        for name, array in self.weights.items():
            shard = self.plan.tensors[name]
            expected = np.empty(array.shape, array.dtype)
            if array.size:
                expected = self.reference.tensor(name, shard.index(self.comm.rank)).astype(array.dtype)
            kind = "replicated" if shard.axis is None else "sharded"
            layer = split_name(name.removeprefix("model."))[1]
            finding = Finding("weights", layer, name, self.comm.rank, kind, measure(array, expected))
            self.findings[finding.name] = finding

    def check_locally(self, progress):
        """All steps against what should have come of their inputs, block by block."""
        check = LocalCheck(
            self.reference,
            self.plan,
            self.comm,
            weights=self.weights,
            had=self.had,
            token_ids=self.token_ids,
            passes=self.passes,
            sums=self.sums,
        )
        for this in self.passes:
            self._judge(this, None, check.before(this))
        for i in range(self.plan.layers):
            for this in self.passes:
                self._judge(this, i, check.attention(i, this))
                self._judge(this, i, check.mlp(i, this))
            progress(1)
        for this in self.passes:
            self._judge(this, None, check.after(this))

    def _judge(self, this, layer, steps):
        _, start, stop = this
        repeats = (stop - start) / len(set(self.token_ids[start:stop]))
        for step, expected, given in steps:
            name = full_name(this[0], layer, step)
            dtype = np.dtype(np.float32) if step in FLOAT32 else self.dtype
            if self.fused and name not in self.names:
                self.unseen[name] = expected.unseen(dtype)
                continue
            array = self.had(this[0], layer, step)
            finding = Finding(this[0], layer, step, self.comm.rank, self.kinds[step].kind, local=None)
            self.findings[finding.name] = finding
            if array.shape != expected.value.shape:
                finding.note = f"shape {list(array.shape)}, expected {list(expected.value.shape)}"
                continue
            if array.dtype != dtype:
                finding.note = f"dtype {array.dtype}, expected {dtype}"
            finding.local = measure(array, expected.value)
            finding.bounds = expected.bounds(dtype, repeats)
            if given is not None and not any(isinstance(x, Unseen) for x in given):
                self.bits.append((finding.name, _digest(*given), _digest(array)))

    def check_bits(self):
        """What comes from the same bits on all ranks must be the same bits on all ranks.

        If they differ, right are those within bounds, then those that most ranks have, then the nearest.
        """
        shares = {name: np.inf if f.note else f.share for name, f in self.findings.items()}
        mine = [(name, *digests, shares[name]) for name, *digests in self.bits]
        for everyones in zip(*self.comm.exchange(mine), strict=True):  # of one step, a rank each
            name = everyones[0][0]
            results = [result for _, _, result, _ in everyones]
            likely = [(share <= 1, results.count(result), -share) for _, _, result, share in everyones]
            right = results[likely.index(max(likely))]
            given = {digest for _, digest, _, _ in everyones}
            if len(given) == 1 and results[self.comm.rank] != right and not self.findings[name].note:
                self.findings[name].note = "not the same bits as on the other ranks"

    def check_totally(self, progress):
        """All steps against the oracle's own run. Rank 0 runs it; the others wait asleep for each layer."""
        layers = iter(())
        if self.comm.rank == 0:
            steps = oracle_steps(self.reference, self.token_ids, self.passes)
            layers = (list(group) for _, group in groupby(steps, key=lambda pair: split_name(pair[0])[1]))
        for number in range(self.plan.layers + 2):  # the embedding, the layers, the logits
            with self.comm.agreed():
                mine = next(layers, None)
            for name, whole in self.comm.exchange(mine)[0]:
                self._measure_total(name, whole)
                if name.endswith("/logits"):
                    self._measure_total(f"{name}_partial", whole)
            progress(1 if 0 < number <= self.plan.layers else 0)

    def _measure_total(self, name, whole):
        kind = self.kinds[split_name(name)[2]]
        part = whole
        if kind.kind == "sharded":
            part = whole[(slice(None),) * kind.axis + (slice(*kind.ranges[self.comm.rank]),)]
        if name not in self.findings:
            return
        array = self.recorded.get_tensor(name)
        if array.shape == part.shape:
            self.findings[name].total = measure(array, part)


def _digest(*arrays):
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.digest()


def _in_order(findings, plan, passes):
    """Weights first, then steps as they happen; a step's ranks together."""
    names = [*[WEIGHTS + name for name in plan.tensors]]
    names += [f"{name}/{step}" for name, _, _ in passes for step in step_names(plan)]
    place = {name: number for number, name in enumerate(names)}
    return sorted(findings, key=lambda finding: (place[finding.name], finding.rank))
