"""The judgement: each recorded step, compared with its operation on the inputs that the engine really had."""

from dataclasses import dataclass, replace

import numpy as np

from minitp.check.difference import difference_of, norm
from minitp.check.replay import Replay
from minitp.check.result import ALL, CheckResult, Finding
from minitp.check.run import in_order
from minitp.check.sums import IN_FLOAT32
from minitp.check.tolerance import concatenated
from minitp.comm.threads import run_threads
from minitp.compare.run import MASKED
from minitp.judge.hypotheses import explain
from minitp.judge.ties import break_ties, idle_experts
from minitp.judge.weights import RankWeights
from minitp.trace.names import AFTER, INTEGERS, PARTIAL, full_name, kinds

VAGUE = 0.1  # the relative error from which a bound that bridges other steps says nothing
SLIGHT, LARGE = 3, 10  # times its bound: the errors that do not hide a later fault, and the faults
HEAD_NORMS = ("attn.q_norm", "attn.k_norm")
QUERIES = ("attn.q", "attn.q_norm", "attn.q_rope")
ROTATED = ("attn.q_rope", "attn.k_rope")
CACHED = {"attn.k_cache": "attn.k_rope", "attn.v_cache": "attn.v"}
# Steps that are read by products of matrices alone.
OPERANDS = (
    *("attn.norm", "attn.q_rope", "attn.k_cache", "attn.probs", "attn.v_cache", "attn.context"),
    *("mlp.norm", "mlp.act", "final_norm"),
)
# The relative error of an engine's frequencies. Transformers computes them in float32: for a theta up to 1e7
# and with scaling, the error is up to 8 * 2^-24.
FREQUENCY_ERROR = 2.0**-20


@dataclass
class Judgement:
    """The result of judging a recording.

    Attributes
    ----------
    result : CheckResult
        A finding for each recorded step on each rank.
    explanation : str
        What the first wrong operation seems to compute instead; empty if nothing fits.
    missing : list of str
        Steps, without pass and layer, that were not recorded.
    unjudged : list of str
        Steps, without pass and layer, that the engine computes in 8 bits.
    unfit : dict of str to (list of int, list of int)
        The shapes of arrays that are not judged because of them, and the expected shapes, by full name.
    vague : dict of str to float
        The bounds of arrays that are not judged because too many steps before them were not recorded.
    notes : list of str
        Remarks about arrays that are right, but not stored as usual.
    idle : dict of int to list of int
        The experts of each layer that no token chose.
    """

    result: CheckResult
    explanation: str
    missing: list
    unjudged: list
    unfit: dict
    vague: dict
    notes: list
    idle: dict


def judge(recording, reference, progress=lambda layers: None):
    """Judge a recording.

    Parameters
    ----------
    recording : EngineRecording
    reference : Oracle
        The oracle of the model that the engine should run.
    progress : callable
        A function that is called with the number of layers done since its last call.

    Returns
    -------
    Judgement
    """

    def judge_rank(comm):
        case = Case(recording, reference, comm)
        with np.errstate(all="ignore"):  # the findings report what is not finite
            case.judge(progress if comm.rank == 0 else lambda layers: None)
        return case

    cases = run_threads(len(recording.ranks), judge_rank)  # a rank is a thread
    findings = in_order([f for case in cases for f in case.findings], recording.plan, recording.passes)
    result = CheckResult(findings, [], [recording.token_ids], recording.passes, len(cases))
    first, _ = first_wrong(result)
    with np.errstate(all="ignore"):
        explanation = explain(cases, wrong_on(result, first)) if first else ""
    missing = dict.fromkeys(step for case in cases for step in case.missing)
    unjudged = dict.fromkeys(step for case in cases for step in case.unjudged)
    unfit = {name: shapes for case in cases for name, shapes in case.unfit.items()}
    vague = {name: bound for case in cases for name, bound in case.vague.items()}
    notes = dict.fromkeys(note for case in cases for note in case.notes)
    idle = idle_experts(cases[0])
    return Judgement(result, explanation, list(missing), list(unjudged), unfit, vague, list(notes), idle)


def first_wrong(result):
    """Return the finding to blame, or None, and the earlier ones whose errors are only slightly too large.

    A large error further on is a fault; an error just above a bound may be none.
    """
    blamed = result.blamed()
    large = next((n for n, finding in enumerate(blamed) if finding.ratio > LARGE), 0)
    if any(finding.ratio > SLIGHT for finding in blamed[:large]):
        large = 0
    return (blamed[large], blamed[:large]) if blamed else (None, [])


def wrong_on(result, first):
    """Return the findings of the first wrong step, of each rank if it is wrong on all ranks, by rank."""
    if first.rank != ALL:
        return {first.rank: first}
    return {rank: f for rank, f in enumerate(f for f in result.findings if f.name == first.name)}


class Case:
    """The recorded steps of a rank, with the operations that they are compared with.

    Attributes
    ----------
    findings : list of Finding
    missing : list of str
        Steps that were not recorded.
    unjudged : list of str
        Steps that the engine computes in 8 bits.
    unfit : dict of str to (list of int, list of int)
        The shapes of arrays that are not judged because of them, and the expected shapes.
    vague : dict of str to float
        The bounds of arrays that are not judged because of them.
    right : dict of str to float64 array
        The expected values of the wrong steps of each pass, up to the first with a large error.
    """

    def __init__(self, recording, reference, comm):
        self.recording, self.reference, self.plan = recording, reference, recording.plan
        self.rank, self.steps = comm.rank, recording.ranks[comm.rank]
        self.weights = RankWeights(
            reference, recording.plan, comm.rank, recording.dtype, recording.matmul_dtype
        )
        self.findings, self.missing, self.unjudged, self.unfit = [], [], [], dict(self.steps.unfit)
        self.right, self._derived, self.notes, self.vague = {}, {}, {}, {}
        self._faulty = set()  # the passes that have a fault
        self._kinds = kinds(recording.plan, recording.config.head_dim)
        self.replay = Replay(
            reference,
            recording.plan,
            comm,
            weights=self.weights,
            recorded=self.recorded,
            sequences=[recording.token_ids],
            kv_dtype=recording.kv_dtype,
            sums=IN_FLOAT32,
            rounds_each=True,  # as NCCL and Gloo do
        )

    def judge(self, progress):
        """Compare all steps; all ranks call this."""
        passes = self.recording.passes
        for pass_ in passes:
            self.check(pass_, None, self.replay.before(pass_))
        for layer in range(self.plan.layers):
            for pass_ in passes:
                self.check(pass_, layer, self.replay.attention(layer, pass_))
                self.break_ties(pass_, layer)
                self.check(pass_, layer, self.replay.mlp(layer, pass_))
            progress(1)
        for pass_ in passes:
            self.check(pass_, None, self.replay.after(pass_))
            if self.recording.has_end and not pass_.logit_rows:
                self.missing += AFTER

    def recorded(self, pass_name, layer, step):
        """Return the array of a step, or what follows from its inputs if it was not recorded."""
        name = full_name(pass_name, layer, step)
        if name in self._derived:
            return self._derived[name]
        if step in OPERANDS and name in self.steps:
            array = self.steps.read(name)
            low = self.recording.matmul_dtype
            return array.astype(low) if array.dtype.itemsize > low.itemsize else array
        if step in CACHED and name not in self.steps:
            names = [pass_.name for pass_ in self.recording.passes]
            until = names[: names.index(pass_name) + 1]
            parts = [self.recorded(one, layer, CACHED[step]) for one in until]  # [K_r, n, d] each
            return concatenated(parts, axis=1)  # [K_r, S, d]
        return self.steps.read(name)

    def check(self, pass_, layer, steps):
        """Enter a finding for each recorded step of `steps`, some (step, Expected, inputs) of a pass."""
        for step, expected, _ in steps:
            name = full_name(pass_.name, layer, step)
            if name not in self.steps:
                if name not in self.unfit:
                    self.missing.append(step)
                self._derive(name, step, expected)
                continue
            if self.recording.roundings.get(step, "") is None:
                self.unjudged.append(step)
                continue
            finding = Finding(pass_.name, layer, step, self.rank, self._kinds[step].kind, local=None)
            array = self._array(name, expected)
            if array.shape != expected.value.shape:
                self.unfit[name] = list(array.shape), list(expected.value.shape)
                self._derive(name, step, expected)
                continue
            self.findings.append(finding)
            if array.dtype.kind in "biu" and step not in INTEGERS:
                finding.note = f"dtype {array.dtype.name}, expected {self.recording.dtype.name}"
                self._derive(name, step, expected)
            else:
                finding.bounds = self._bounds(pass_, layer, step, expected, array.dtype)
                finding.local = difference_of(array, expected.value)
                if step in QUERIES and not finding.ok:
                    self._accept_scaled(finding, array, expected)
                if step in PARTIAL and len(self.recording.ranks) == 1:
                    # It may be the sum of several ranks, whose order and roundings are not known.
                    self._derive(name, step, expected)
            if finding.ok and expected.roundings and finding.bounds[0] > VAGUE:
                self.findings.remove(finding)
                self.vague[name] = finding.bounds[0]
            if not finding.ok and pass_.name not in self._faulty:
                self.right[name] = expected.value
                self._faulty |= {pass_.name} if finding.ratio > LARGE else set()

    def _bounds(self, pass_, layer, step, expected, dtype):
        """Return the largest relative and absolute error allowed of an array that was recorded in `dtype`."""
        ids = self.recording.token_ids[pass_.start : pass_.stop]
        repeats = len(ids) / len(set(ids))  # the average number of times that a token occurs
        dtype = self.recording.roundings.get(step, dtype)
        if step in HEAD_NORMS:
            dtype = self._coarser(dtype, full_name(pass_.name, layer, step.removesuffix("_norm")))
        bounds = expected.bounds(dtype, repeats)
        if step in ROTATED and expected.scale is not None:
            return self._with_angle_errors(pass_, layer, expected, bounds)
        return bounds

    def _coarser(self, dtype, name):
        """Return the coarser of a dtype and that of an array.

        Under autocast, the norm of a head is rounded to its input's dtype before the product with the weight.
        """
        other = self.steps.read(name).dtype if name in self.steps else np.dtype(dtype)
        return min(np.dtype(dtype), other, key=lambda one: one.itemsize)

    def _accept_scaled(self, finding, array, expected):
        """Accept queries that are stored times the scale of the scores; attention gets them without it."""
        root = self.reference.score_root
        queries = (array.astype(np.float64) * root).astype(array.dtype)  # [H_r, T, d]
        scaled = replace(finding, local=difference_of(queries, expected.value))
        if scaled.ok:
            finding.local, self._derived[finding.name] = scaled.local, queries
            self.notes[f"{finding.step} is stored times {1 / root:.3g}, the scale of the scores"] = True

    def _array(self, name, expected):
        """Return a recorded array in the layout that fits; of several, in the one that is clearly closer."""
        choices = self.steps.layouts(name)
        if len(choices) > 1:
            best, least = None, np.inf
            for layout in choices:
                array = self.steps.read(name, layout)
                if array.shape == expected.value.shape:
                    error = difference_of(array, expected.value).relative
                    if best is None or error < least / 2:
                        best, least = layout, error
            self.steps.choose(name, best or choices[0])
        array = self.steps.read(name)
        if name.endswith("attn.scores") and array.shape == expected.value.shape:
            array[(array < MASKED) & np.isneginf(expected.value)] = -np.inf  # as in `compare`
        return array

    def break_ties(self, pass_, layer):
        """Let the replay choose the engine's experts where the router's logits are equal."""
        names = [full_name(pass_.name, layer, f"mlp.{step}") for step in ("router", "norm", "out")]
        if not self.reference.experts or not all(name in self.steps for name in names):
            return
        router, x, out = (self.steps.read(name).astype(np.float64) for name in names)
        if router.ndim == x.ndim == out.ndim == 2 and len(router) == len(x) == len(out):
            block = f"model.layers.{layer}.{self.reference.expert_block}.experts"

            def weight(expert, part):
                return self.weights.whole(f"{block}.{expert}.{part}.weight")

            self._derived[names[0]] = break_ties(router, x, out, self.reference, weight)

    def _with_angle_errors(self, pass_, layer, expected, bounds):
        """Return the bounds of RoPE for frequencies in float32, whose errors grow with the position."""
        positions = np.abs(self.recorded(pass_.name, None, "positions"))  # [T]
        angles = np.multiply.outer(positions, self.reference.rotations[layer][0])  # [T, R/2]
        pairs = angles.shape[1]
        errors = FREQUENCY_ERROR * angles * expected.scale[..., :pairs]  # [n, T, R/2]
        size = norm(expected.value)
        relative = 2**0.5 * norm(errors) / size if size else 0.0  # of both elements of each pair
        return bounds[0] + relative, bounds[1] + errors.max(initial=0.0)

    def _derive(self, name, step, expected):
        """Let later operations have what an Expected says of a step, in place of a recorded array."""
        dtype = self.recording.matmul_dtype if step == "attn.scores" else self.recording.dtype
        dtype = np.int64 if step in INTEGERS else dtype
        is_array = expected.low_precision_reference is None or step == "mlp.router"
        self._derived[name] = expected.value.astype(dtype) if is_array else expected.not_recorded(dtype)
