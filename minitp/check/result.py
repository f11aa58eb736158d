"""What a check finds out: a line for each step on each rank, and who is to blame."""

from dataclasses import dataclass, replace

from minitp.check.difference import Difference
from minitp.trace.names import full_name

# Steps whose value comes from all ranks at once: wrong on all, they are nobody's own fault.
COLLECTIVE = ("embed", "attn.out", "mlp.out", "logits")
ALL = "all"


@dataclass
class Finding:
    """One step on one rank.

    Attributes
    ----------
    pass_name : str
        `prefill`, `decode.1`, ..; `weights` for a tensor, whose `step` is its checkpoint name.
    layer : int or None
    step : str
        As in the tables of `trace.names`.
    rank : int, or "all" for a collective
    kind : str
        replicated, sharded or partial.
    local : Difference or None
        None for an array of a wrong shape.
    bounds : (float, float)
        What `local` may have: relative, absolute.
    total : Difference or None
        None where the oracle has no such step.
    note : str
        What else is wrong.
    """

    pass_name: str
    layer: int | None
    step: str
    rank: int | str
    kind: str
    local: Difference | None
    bounds: tuple = (0.0, 0.0)
    total: Difference | None = None
    note: str = ""

    @property
    def name(self):
        """The step's full name."""
        if self.pass_name == "weights":
            return f"weights/{self.step}"
        return full_name(self.pass_name, self.layer, self.step)

    @property
    def share(self):
        """The local error as a share of its bound, the relative or the absolute one; above 1 is wrong."""
        if self.local is None:
            return float("inf")
        pairs = zip((self.local.relative, self.local.absolute), self.bounds, strict=True)
        return max(error / bound if bound else (float("inf") if error else 0.0) for error, bound in pairs)

    @property
    def ok(self):
        return self.share <= 1 and not self.note


@dataclass
class CheckResult:
    """All that a check has found.

    Attributes
    ----------
    findings : list of Finding
        Ordered by the time at which the step happens, then by rank.
    problems : list of (rank or "all", str)
        Of the plan.
    token_ids : list of int
        All that went in.
    passes : list of (name, start, stop)
    tp : int
    """

    findings: list
    problems: list
    token_ids: list
    passes: list
    tp: int

    @property
    def ok(self):
        return not self.problems and all(finding.ok for finding in self.findings)

    def blamed(self):
        """The findings that are out of bounds, in order; a collective that is so on all ranks counts once."""
        wrong = [finding for finding in self.findings if not finding.ok]
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
