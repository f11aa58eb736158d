"""The result of a check: a finding for each step on each rank, and which of them to blame."""

from dataclasses import dataclass, field, replace

from minitp.check.difference import Difference
from minitp.trace.names import full_name

# Steps that combine arrays of all ranks or come from rank 0: if one is wrong on all ranks, no single rank is
# to blame.
COLLECTIVE = ("tokens", "embed", "attn.out", "mlp.out", "logits")
ALL = "all"


def ratio_of(error, bound):
    """Return an error as a fraction of its bound; an infinite bound allows any error, and NaN none."""
    if bound == float("inf") or error == 0:
        return 0.0
    return error / bound if bound > 0 else float("inf")


@dataclass
class Finding:
    """The result of checking one step on one rank.

    Attributes
    ----------
    pass_name : str
        `prefill`, `decode.1`, .. (see `passes`), or `weights` for a tensor, whose `step` is its checkpoint
        name.
    layer : int or None
    step : str
        Name of the step, as in the tables of `trace.names`.
    rank : int, or "all" for a collective
    kind : str
        replicated, sharded or partial.
    local : Difference or None
        The local error; None if the array has the wrong shape.
    bounds : (float, float)
        The largest relative and absolute error allowed in `local`.
    total : Difference or None
        The total error; None if the oracle has no such step.
    total_bound : float or None
        The largest relative error allowed in `total`; None if there is no bound.
    note : str
        Anything else that is wrong, such as the shape or the dtype.
    """

    pass_name: str
    layer: int | None
    step: str
    rank: int | str
    kind: str
    local: Difference | None
    bounds: tuple = (0.0, 0.0)
    total: Difference | None = None
    total_bound: float | None = None
    note: str = ""

    @property
    def name(self):
        """The step's full name, such as `decode.1/layers.3.attn.q`."""
        if self.pass_name == "weights":
            return f"weights/{self.step}"
        return full_name(self.pass_name, self.layer, self.step)

    @property
    def ratio(self):
        """The larger of relative and absolute local error, each divided by its bound; above 1 it is wrong."""
        if self.local is None:
            return float("inf")
        pairs = zip((self.local.relative, self.local.absolute), self.bounds, strict=True)
        return max(ratio_of(error, bound) for error, bound in pairs)

    @property
    def ok(self):
        return self.ratio <= 1 and not self.note

    @property
    def unexplained(self):
        """True if the total error exceeds its bound, which is a fault only if no step is wrong locally."""
        return None not in (self.total, self.total_bound) and not self.total.relative <= self.total_bound


@dataclass
class CheckResult:
    """All findings of a check.

    Attributes
    ----------
    findings : list of Finding
        Findings in the order of the run, then by rank.
    problems : list of (rank or "all", str)
        Faults of the sharding plan.
    sequences : list of list of int
        Tokens of each sequence of the run: those of the prompt, then the decoded ones. The first sequence is
        the user's prompt; the others ran through the engine.
    passes : list of RecordedPass
    tp : int
    warnings : list of str
        Remarks about steps that are within their bounds, for which no step is blamed.
    replica_difference : replicas.ReplicaDifference or None
        The first step whose bits another replica group does not have.
    """

    findings: list
    problems: list
    sequences: list
    passes: list
    tp: int
    warnings: list = field(default_factory=list)
    replica_difference: object = None

    @property
    def ok(self):
        return not self.problems and not self.blamed()

    def blamed(self):
        """Return the wrong findings, in order; a collective that is wrong on all ranks counts once.

        If every step is right for its inputs, but some total errors exceed their bounds, the first step with
        such an error is wrong: its inputs are not those that the run should have.
        """
        wrong = [finding for finding in self.findings if not finding.ok]
        if not wrong:
            wrong = [finding for finding in self.findings if finding.unexplained]
            wrong = [finding for finding in wrong if finding.name == wrong[0].name]
        ranks = {}
        for finding in wrong:
            ranks.setdefault(finding.name, []).append(finding)
        blamed = []
        for finding in wrong:
            everywhere = finding.step in COLLECTIVE and len(ranks[finding.name]) == self.tp
            if not everywhere:
                blamed.append(finding)
            elif finding is ranks[finding.name][0]:
                blamed.append(replace(finding, rank=ALL))
        return blamed
