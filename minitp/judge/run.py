"""The judgement: each recorded step, compared with its operation on the inputs that the engine really had."""

from dataclasses import dataclass

import numpy as np

from minitp.check.difference import difference_of, norm
from minitp.check.replay import Replay
from minitp.check.result import CheckResult, Finding
from minitp.check.sums import IN_FLOAT32
from minitp.comm.single import SingleRank
from minitp.judge.hypotheses import explain
from minitp.judge.recording import NEEDED
from minitp.judge.ties import break_ties
from minitp.trace.names import INTEGERS, full_name

ROTATED = ("attn.q_rope", "attn.k_rope")
# The relative error of an engine's frequencies. Transformers computes them in float32: for a theta up to 1e7
# and with scaling, the error is up to 8 * 2^-24.
FREQUENCY_ERROR = 2.0**-20


@dataclass
class Judgement:
    """The result of judging a recording.

    Attributes
    ----------
    result : CheckResult
        A finding for each recorded step.
    explanation : str
        What the first wrong operation seems to compute instead; empty if nothing fits.
    missing : list of str
        Steps, without pass and layer, that were not recorded.
    """

    result: CheckResult
    explanation: str
    missing: list


class CheckpointWeights:
    """The checkpoint's tensors by name, [out, in] as in the file, rounded to the engine's dtype."""

    def __init__(self, reference, names, dtype):
        self._reference, self._names, self._dtype = reference, names, dtype

    def __getitem__(self, name):
        return np.asarray(self._reference.tensor(name)).astype(self._dtype)

    def get(self, name, default=None):
        """Return a tensor, or `default` if the model has none of this name."""
        return self[name] if name in self._names else default


def judge(recording, source, reference, progress=lambda layers: None):
    """Judge a recording.

    Parameters
    ----------
    recording : EngineRecording
    source : ModelSource
        The model that the engine should run, with a plan for one rank.
    reference : Oracle
        The oracle of the same model.
    progress : callable
        A function that is called with the number of layers done since its last call.

    Returns
    -------
    Judgement
    """
    case = Case(recording, source, reference)
    with np.errstate(all="ignore"):  # the findings report what is not finite
        for pass_ in recording.passes:
            case.check(pass_, None, case.replay.before(pass_))
        for layer in range(source.plan.layers):
            for pass_ in recording.passes:
                case.check(pass_, layer, case.replay.attention(layer, pass_))
                case.break_ties(pass_, layer)
                case.check(pass_, layer, case.replay.mlp(layer, pass_))
            progress(1)
        for pass_ in recording.passes:
            case.check(pass_, None, case.replay.after(pass_))
        result = CheckResult(case.findings, [], [recording.metadata.token_ids], recording.passes, 1)
        blamed = result.blamed()
        explanation = explain(case, blamed[0]) if blamed else ""
    return Judgement(result, explanation, list(dict.fromkeys(case.missing)))


class Case:
    """The recorded steps of an engine, with the operations that they are compared with.

    Attributes
    ----------
    findings : list of Finding
    missing : list of str
        Steps that were not recorded.
    """

    def __init__(self, recording, source, reference):
        self.recording, self.reference, self.plan = recording, reference, source.plan
        self.weights = CheckpointWeights(reference, source.plan.tensors, recording.dtype)
        self.findings, self.missing, self._derived = [], [], {}
        self.replay = Replay(
            reference,
            source.plan,
            SingleRank(),
            weights=self.weights,
            recorded=self.recorded,
            sequences=[recording.metadata.token_ids],
            kv_dtype="auto",
            sums=IN_FLOAT32,
        )

    def recorded(self, pass_name, layer, step):
        """Return the array of a step, or what follows from its inputs if it was not recorded."""
        name = full_name(pass_name, layer, step)
        return self._derived[name] if name in self._derived else self.recording.read(name)

    def check(self, pass_, layer, steps):
        """Enter a finding for each recorded step of `steps`, some (step, Expected, inputs) of a pass."""
        ids = self.recording.metadata.token_ids[pass_.start : pass_.stop]
        repeats = len(ids) / len(set(ids))  # the average number of times that a token occurs
        for step, expected, _ in steps:
            name = full_name(pass_.name, layer, step)
            if name not in self.recording:
                self.missing.append(step)
                self._derive(name, step, expected)
                continue
            array = self.recording.read(name)
            finding = Finding(pass_.name, layer, step, 0, "replicated", local=None)
            self.findings.append(finding)
            if array.shape != expected.value.shape:
                finding.note = f"shape {list(array.shape)}, expected {list(expected.value.shape)}"
                self._derive(name, step, expected)
                continue
            if array.dtype.kind in "biu" and step not in INTEGERS:
                finding.note = f"dtype {array.dtype.name}, expected {self.recording.dtype.name}"
                self._derive(name, step, expected)
                continue
            finding.bounds = expected.bounds(array.dtype, repeats)
            if step in ROTATED and expected.scale is not None:
                finding.bounds = self._with_angle_errors(pass_, layer, expected, finding.bounds)
            finding.local = difference_of(array, expected.value)

    def break_ties(self, pass_, layer):
        """Let the replay choose the engine's experts where the router's logits are equal."""
        names = [full_name(pass_.name, layer, f"mlp.{step}") for step in ("router", "norm", "out")]
        if not self.reference.experts or not all(name in self.recording for name in names):
            return
        router, x, out = (self.recording.read(name).astype(np.float64) for name in names)
        if router.ndim == x.ndim == out.ndim == 2 and len(router) == len(x) == len(out):
            block = f"model.layers.{layer}.{self.reference.expert_block}.experts"

            def weight(expert, part):
                return self.weights[f"{block}.{expert}.{part}.weight"]

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
        dtype = np.int64 if step in INTEGERS else self.recording.dtype
        is_copy = expected.low_precision_reference is None or step.rpartition(".")[2] in NEEDED
        self._derived[name] = expected.value.astype(dtype) if is_copy else expected.not_recorded(dtype)
