"""A check: compare every step of every rank with the oracle and find the first wrong one.

Each rank records its steps in its own file while it runs. Then every step gets two errors:

        local    the array compared with the result of the oracle's operation on the inputs that this rank
             recorded. A step is blamed only for its local error, so a wrong step is not blamed on later ones.
    total    the array compared with the oracle's own run from the tokens: the accumulated error

It also checks that replicated steps have the same bits on all ranks, that the partial sums add up to the
result of the all-reduce, that the cache contains the keys and values of all passes so far, that each weight
is its slice of the checkpoint, and that the plan covers the model (`check.plan`).
"""

import hashlib
import tempfile
from itertools import groupby
from pathlib import Path

import numpy as np
from safetensors import safe_open

from minitp.check.difference import difference_of
from minitp.check.plan import plan_problems
from minitp.check.replay import Replay
from minitp.check.result import CheckResult, Finding
from minitp.check.sums import sums_of
from minitp.check.tolerance import NotRecorded
from minitp.loading.safetensors_writer import TensorWriter
from minitp.loading.weights import named_slices
from minitp.trace.names import FLOAT32, WEIGHTS, full_name, kinds, split_name, step_names
from minitp.trace.record import Recorder, run_passes
from minitp.trace.reference import open_oracle, oracle_steps


def check_model(source, model, token_ids, passes, progress=lambda layers: None):
    """Run a prompt through a Model and check every step; all ranks call this and get the same result.

    Parameters
    ----------
    source : ModelSource
    model : Model
    token_ids : list of int
    passes : list of (name, start, stop)
        From `trace.record.passes_of`.
    progress : callable
        Function that is called with the number of layers done since the last call, twice per layer in all.
    """
    comm = model.comm
    reference = open_oracle(source)
    problems = plan_problems(reference, source.plan)
    if problems:
        return CheckResult([], problems, list(token_ids), passes, comm.size)
    with np.errstate(all="ignore"):  # the findings report what is not finite
        ids, recorded = _record(model, token_ids, passes)
        host = model.device.to_host
        weights = {name: host(array) for name, array in named_slices(model.weights, source.plan, comm.rank)}
        rank = _Rank(source, reference, model, weights, recorded, ids, passes)
        rank.check_weights()
        rank.check_locally(progress)
        rank.check_bits()
        rank.check_totally(progress)
    findings = [finding for found in comm.allgather_object(rank.findings) for finding in found.values()]
    return CheckResult(_in_order(findings, source.plan, passes), problems, ids, passes, comm.size)


def _record(model, token_ids, passes):
    """Run the passes; return all tokens of the run and an open file with the steps of this rank."""
    names = [f"{name}/{step}" for name, _, _ in passes for step in step_names(model.plan)]
    with tempfile.TemporaryDirectory(prefix="minitp-check-") as folder:
        path = Path(folder) / "steps.safetensors"
        with TensorWriter(path, names, metadata={}) as file:
            ids = run_passes(model, token_ids, passes, Recorder(model.device, set(names), file.write))
        # The open file remains readable after its name is gone, so a killed rank leaves no file.
        with model.comm.agreed():
            return ids, safe_open(path, framework="np")


class _Rank:
    """A rank that checks its own steps, and its findings by full name."""

    def __init__(self, source, reference, model, weights, recorded, token_ids, passes):
        self.plan, self.comm, self.reference = source.plan, model.comm, reference
        self.fused, self.dtype, self.sums = model.fused, model.device.dtype, sums_of(model.device)
        self.names = set(recorded.keys())
        self.not_recorded = {}  # full name -> NotRecorded, for steps inside a fused operation
        self.weights, self.recorded = weights, recorded
        self.token_ids, self.passes = token_ids, passes
        self.kinds = kinds(source.plan, source.config.head_dim)
        self.findings = {}
        self.bits = []  # (full name, hash of the inputs, hash of the output) of replicated steps

    def recorded_array(self, pass_name, layer, step):
        """Return this rank's array of a step, or a NotRecorded inside a fused operation."""
        name = full_name(pass_name, layer, step)
        return self.not_recorded[name] if name in self.not_recorded else self.recorded.get_tensor(name)

    def check_weights(self):
        """Compare each weight with its slice of the checkpoint, which the oracle reads."""
        for name, array in self.weights.items():
            shard = self.plan.tensors[name]
            expected = np.empty(array.shape, array.dtype)
            if array.size:
                expected = self.reference.tensor(name, shard.index(self.comm.rank)).astype(array.dtype)
            kind = "replicated" if shard.axis is None else "sharded"
            layer = split_name(name.removeprefix("model."))[1]
            finding = Finding("weights", layer, name, self.comm.rank, kind, difference_of(array, expected))
            self.findings[finding.name] = finding

    def check_locally(self, progress):
        """Compute the local error of every step, layer by layer."""
        replay = Replay(
            self.reference,
            self.plan,
            self.comm,
            weights=self.weights,
            recorded=self.recorded_array,
            token_ids=self.token_ids,
            passes=self.passes,
            sums=self.sums,
        )
        for pass_ in self.passes:
            self._judge(pass_, None, replay.before(pass_))
        for i in range(self.plan.layers):
            for pass_ in self.passes:
                self._judge(pass_, i, replay.attention(i, pass_))
                self._judge(pass_, i, replay.mlp(i, pass_))
            progress(1)
        for pass_ in self.passes:
            self._judge(pass_, None, replay.after(pass_))

    def _judge(self, pass_, layer, steps):
        pass_name, start, stop = pass_
        repeats = (stop - start) / len(set(self.token_ids[start:stop]))
        for step, expected, inputs in steps:
            name = full_name(pass_name, layer, step)
            dtype = np.dtype(np.float32) if step in FLOAT32 else self.dtype
            if self.fused and name not in self.names:
                self.not_recorded[name] = expected.not_recorded(dtype)
                continue
            array = self.recorded_array(pass_name, layer, step)
            finding = Finding(pass_name, layer, step, self.comm.rank, self.kinds[step].kind, local=None)
            self.findings[finding.name] = finding
            if array.shape != expected.value.shape:
                finding.note = f"shape {list(array.shape)}, expected {list(expected.value.shape)}"
                continue
            if array.dtype != dtype:
                finding.note = f"dtype {array.dtype}, expected {dtype}"
            finding.local = difference_of(array, expected.value)
            finding.bounds = expected.bounds(dtype, repeats)
            if inputs is not None and not any(isinstance(x, NotRecorded) for x in inputs):
                self.bits.append((finding.name, _digest(*inputs), _digest(array)))

    def check_bits(self):
        """Check that replicated steps with the same inputs have the same bits on all ranks.

        If they differ, an array within bounds is right; if there are several, the one that most ranks have;
        and if that does not decide, the one nearest to the expected value.
        """
        ratios = {name: np.inf if f.note else f.ratio for name, f in self.findings.items()}
        mine = [(name, *digests, ratios[name]) for name, *digests in self.bits]
        for ranks in zip(*self.comm.allgather_object(mine), strict=True):  # one step on all ranks
            name = ranks[0][0]
            results = [result for _, _, result, _ in ranks]
            likely = [(ratio <= 1, results.count(result), -ratio) for _, _, result, ratio in ranks]
            right = results[likely.index(max(likely))]
            inputs = {digest for _, digest, _, _ in ranks}
            if len(inputs) == 1 and results[self.comm.rank] != right and not self.findings[name].note:
                self.findings[name].note = "not the same bits as on the other ranks"

    def check_totally(self, progress):
        """Compute the total error of every step; rank 0 runs the oracle while the other ranks wait."""
        layers = iter(())
        if self.comm.rank == 0:
            steps = oracle_steps(self.reference, self.token_ids, self.passes)
            layers = (list(group) for _, group in groupby(steps, key=lambda pair: split_name(pair[0])[1]))
        for number in range(self.plan.layers + 2):  # the embedding, the layers, the logits
            with self.comm.agreed():
                mine = next(layers, None)
            for name, whole in self.comm.allgather_object(mine)[0]:
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
            self.findings[name].total = difference_of(array, part)


def _digest(*arrays):
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.digest()


def _in_order(findings, plan, passes):
    """Sort the findings: weights first, then steps in the order of the run; each step by rank."""
    names = [*[WEIGHTS + name for name in plan.tensors]]
    names += [f"{name}/{step}" for name, _, _ in passes for step in step_names(plan)]
    position = {name: number for number, name in enumerate(names)}
    return sorted(findings, key=lambda finding: (position[finding.name], finding.rank))
