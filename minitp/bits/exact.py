"""The test of a suspect difference: the error of the step for its own inputs, and the bounds of `check`."""

from itertools import groupby

from minitp.check.difference import difference_of
from minitp.check.passes import RecordedPass
from minitp.check.rank import HostWeights
from minitp.check.replay import Replay
from minitp.check.result import Finding
from minitp.check.sums import sums_of
from minitp.trace.names import FLOAT32, LAYER, full_name
from minitp.trace.reference import open_oracle


class ExactCheck:
    """The oracle's operations for steps that a rank has recorded.

    Parameters
    ----------
    source : ModelSource
    model : Model
    ids : list of int
        The prompt.
    step_file : StepFile
    """

    def __init__(self, source, model, ids, step_file):
        self.model, self.step_file = model, step_file
        self.replay = Replay(
            open_oracle(source),
            source.plan,
            model.comm,
            weights=HostWeights(model, source.plan),
            recorded=lambda pass_name, layer, step: step_file.read(full_name(pass_name, layer, step)),
            sequences=[list(ids)],
            kv_dtype="auto",
            sums=sums_of(model.device),
        )

    def first_wrong(self, recording, steps):
        """Return the first Finding, on any rank, whose error exceeds its bound; None if none does.

        All ranks call this with the same steps.

        Parameters
        ----------
        recording : RankRecording
        steps : list of (int, int, str)
            The number of the pass, the layer and the name of each step to check; steps outside the layers
            are left out.
        """
        passes, cached = [], ()
        for one in recording.passes:
            passes.append(RecordedPass(one.name, 0, one.start, one.stop, cached))
            cached += passes[-1].origins
        inside = sorted(
            (step for step in set(steps) if step[2] in LAYER),
            key=lambda step: (*step[:2], list(LAYER).index(step[2])),
        )
        for (number, layer, block), group in groupby(inside, lambda s: (*s[:2], s[2].partition(".")[0])):
            findings = self._check_block(passes[number], layer, block, {step for _, _, step in group})
            by_rank = self.model.comm.allgather_object(findings)
            wrong = [one for found in zip(*by_rank, strict=True) for one in found if not one.ok]
            if wrong:
                return wrong[0]
        return None

    def _check_block(self, pass_, layer, block, steps):
        """Return this rank's Finding for each of some steps of a block, in order."""
        block_steps = (self.replay.attention if block == "attn" else self.replay.mlp)(layer, pass_)
        repeats = (pass_.stop - pass_.start) / len(set(self.replay.sequences[0][pass_.start : pass_.stop]))
        findings = []
        for step, expected, _ in block_steps:
            if step not in steps:
                continue
            array = self.step_file.read(full_name(pass_.name, layer, step))
            dtype = "float32" if step in FLOAT32 else self.model.device.dtype
            finding = Finding(pass_.name, layer, step, self.model.comm.rank, "", None)
            finding.bounds = expected.bounds(dtype, repeats)
            finding.local = difference_of(array, expected.value)
            findings.append(finding)
        return findings
