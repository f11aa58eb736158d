"""The goals of minitp on a GPU: what each row of the table measures, its limit, and the share to reach.

Every limit is measured in the same run. The goals in milliseconds for an H200 are the same shares of 4.59
TB/s, which one H200 read.
"""

import re
from dataclasses import dataclass

from minitp.errors import one_line
from minitp.util.format import aligned

FAST_GPU = "H200"  # the GPU with goals in milliseconds
ROWS = (8, 16, 32, 64)
REQUESTS = (16, 64)
LONG_KEYS = 16384
FILE_GB = 14
PROMPTS = (32, 2048, 8192)
NOT_RUN = "not run"
FUSED = "check every family, fused, bfloat16"


class MissingError(Exception):
    """The reason why a figure is missing."""


@dataclass(frozen=True)
class Measured:
    """A measured figure and its limit, in the same unit; `limit` is None if there is none.

    The unit is that of a time (us, ms, s), where less is better, or of a rate, where more is.
    """

    value: float
    unit: str
    limit: float | None = None

    @property
    def share(self):
        """The share of the limit that is reached, or None."""
        if self.limit is None or not self.value:
            return None
        return self.limit / self.value if self.is_time else self.value / self.limit

    @property
    def is_time(self):
        """True if the figure is a time."""
        return self.unit in ("us", "ms", "s")


@dataclass(frozen=True)
class Goal:
    """A row of the table.

    Attributes
    ----------
    task : str
        The name of the task whose result contains the figures.
    read : callable
        read(outcome, results) returns a Measured; `outcome` is the task's, `results` those of all tasks by
        name.
    share : float or None
        The share of the limit to reach.
    least : float or None
        A time to reach, in `unit`; with `gpu`, only on GPUs whose names contain it.
    gpu, unit : str
    """

    name: str
    task: str
    read: object
    share: float | None = None
    least: float | None = None
    gpu: str = ""
    unit: str = "ms"

    def reached(self, measured, gpu):
        """Return whether one of the goals is reached."""
        fast_enough = self.least is not None and self.gpu in gpu and measured.value <= self.least
        return fast_enough or (self.share is not None and (measured.share or 0.0) >= self.share)

    def words(self, gpu):
        """Return the goal in words."""
        found = [] if self.share is None else [f"{self.share:.0%}"]
        if self.least is not None and self.gpu in gpu:
            found.append(f"{self.least:g} {self.unit}")
        return " or ".join(found)


# --- what the figures are -------------------------------------------------------------------------------


def decode_ms(outcome, _):
    """Return the time of a decode pass of one sequence, and that of reading its bytes."""
    point, seconds = point_of(outcome, 1), outcome["result"]["read_gb_per_s"] * 1e9
    return Measured(point["us"] / 1e3, "ms", 1e3 * point["bytes"] / seconds)


def batch_rate(rows):
    """Return a function that gives the tokens/s of a decode pass of `rows` sequences."""

    def read(outcome, _):
        point = point_of(outcome, rows)
        rate = 1e6 * rows / point["us"]
        return Measured(rate, "tokens/s", rate / point["share_of_reads"])

    return read


def attention_us(outcome, _):
    """Return the time of a layer's attention, and that of reading its keys and values."""
    kernels = point_of(outcome, 1)["kernels"]
    one = next((one for one in kernels if one["name"].startswith("attention")), None)
    if one is None or "failed" in one:
        raise MissingError("attention was not measured" if one is None else one["failed"])
    return Measured(one["us"], "us", one["floor_us"])


def point_of(outcome, rows):
    """Return a point of graphs.py, or raise MissingError with the reason why it is missing."""
    point = next((one for one in outcome["result"]["points"] if one["rows"] == rows), None)
    if point is None or "failed" in point:
        raise MissingError("not measured" if point is None else point["failed"])
    return point


def engine_rate(outcome, _):
    """Return the engine's tokens/s; the limit is the rate of its decode graph alone."""
    return Measured(outcome["result"]["tokens_per_s"], "tokens/s", outcome["result"]["graph_tokens_per_s"])


def serve_rate(count, kind):
    """Return a function that gives the server's tokens/s; the limit is the engine's rate."""

    def read(outcome, results):
        points = outcome["result"]["points"]
        point = next((one for one in points if one["requests"] == count), None)
        engine = results.get(f"engine, {count} requests", {}).get("result")
        if point is None or not engine:
            raise MissingError("not measured" if point is None else "the engine was not measured")
        return Measured(point[kind], "tokens/s", engine["tokens_per_s"])

    return read


def prompt_ms(outcome, _):
    """Return the time of a prompt, and the minimum time of its products and reads."""
    prefill = outcome["result"]["prefill"]
    return Measured(1e3 * prefill["ttft_s"]["median"], "ms", 1e3 * prefill["limit_s"]["median"])


def prompt_rate(outcome, _):
    """Return the rate of a prompt's products; the limit is cuBLAS's rate in the same shapes."""
    rate = outcome["result"]["limits"]["matrix_gflop_per_s"] / 1e3
    share = outcome["result"]["prefill"]["share_of_matrix_rate"]["median"]
    return Measured(share * rate, "TFLOP/s", rate)


def loading_rate(outcome, _):
    """Return the rate of loading; the limit is the rate of reading the file."""
    loading = outcome["result"]["loading"]
    return Measured(loading["gb_per_s"], "GB/s", loading["file_gb_per_s"])


def loading_s(outcome, _):
    """Return the seconds that loading FILE_GB would take at the measured rate."""
    return Measured(FILE_GB / outcome["result"]["loading"]["gb_per_s"], "s")


def families(outcome, _):
    """Return the number of families that are right on the fused path, out of all."""
    found = re.search(r"right: (\d+) of (\d+) families", outcome["said"])
    if found is None:
        raise MissingError(outcome["said"])
    return Measured(int(found[1]), "families", int(found[2]))


def passed(outcome, _):
    """Return that a check passed, which is the goal."""
    return Measured(1, "check", 1)


# --- the rows -------------------------------------------------------------------------------------------

ONE, SHARE = "graphs, TP=1", "graphs, rank 0 of 4"
GOALS = (
    Goal("decode, 512 keys, TP=1", ONE, decode_ms, 0.90, 3.45, FAST_GPU),
    Goal("  one rank of TP=4, without its sums", SHARE, decode_ms, 0.68, 1.15, FAST_GPU),
    *(Goal(f"  batch of {rows}", ONE, batch_rate(rows), 0.80) for rows in ROWS),
    Goal(
        f"attention, {LONG_KEYS} keys, Llama 3 8B",
        f"attention, {LONG_KEYS} keys",
        attention_us,
        0.80,
    ),
    *(
        Goal(f"engine, {n} requests, of the graph", f"engine, {n} requests", engine_rate, 0.85)
        for n in REQUESTS
    ),
    *(
        Goal(f"serve, {n} requests{words}, of the engine", "serve", serve_rate(n, kind), 0.95)
        for n in REQUESTS
        for words, kind in (("", "tokens_per_s"), (", streamed", "streamed_tokens_per_s"))
    ),
    Goal(f"prompt of {PROMPTS[0]} tokens", f"prompt of {PROMPTS[0]}", prompt_ms, least=5.0),
    Goal(f"prompt of {PROMPTS[1]} tokens, of cuBLAS", "prefill", prompt_rate, 0.80),
    Goal(f"prompt of {PROMPTS[2]} tokens, of cuBLAS", f"prompt of {PROMPTS[2]}", prompt_rate, 0.80),
    Goal("loading, of reading the file", "loading", loading_rate, 0.80),
    Goal(f"loading {FILE_GB} GB, at that rate", "loading", loading_s, least=4.0, unit="s"),
    Goal("families on the fused path", FUSED, families, 1.0),
    Goal("four ranks on one GPU, host memory", "four ranks on one GPU, mpi", passed, 1.0),
    Goal("four ranks on one GPU, NCCL", "four ranks on one GPU, nccl", passed, 1.0),
    Goal("four processes, sums in peer memory", "four processes on one GPU, peer memory", passed, 1.0),
    Goal("NCCL, one rank", "NCCL, one rank", passed, 1.0),
)


def rows(gpu, outcomes):
    """Return a dict for JSON for each goal: the figure, its limit and share, the goal, or why it failed.

    Parameters
    ----------
    gpu : str
        The GPU's name.
    outcomes : list of dict
        The outcomes of `tasks.Runner`.
    """
    by_name, found = {one["name"]: one for one in outcomes}, []
    for goal in GOALS:
        row = {"name": goal.name.strip(), "indent": len(goal.name) - len(goal.name.lstrip())}
        try:
            measured = goal.read(outcome_of(by_name, goal.task), by_name)
        except MissingError as error:
            row |= {"failed": str(error), "goal": goal.words(gpu)}
        except (LookupError, TypeError) as error:
            row |= {"failed": f"its result lacks a figure: {one_line(error)}", "goal": goal.words(gpu)}
        else:
            row |= {"value": measured.value, "unit": measured.unit, "limit": measured.limit}
            row |= {"share": measured.share, "goal": goal.words(gpu)}
            row["reached"] = goal.reached(measured, gpu)
        found.append(row)
    return found


def outcome_of(by_name, task):
    """Return a task's outcome, or raise MissingError with the reason why it has no figures."""
    outcome = by_name.get(task)
    if outcome is None:
        raise MissingError(NOT_RUN)
    if outcome["status"] != "ok":
        raise MissingError(outcome["said"])
    return outcome


def goal_lines(gpu, outcomes):
    """Return the table of the goals as lines of text."""
    table = [("", "measured", "limit", "share", "goal", "reached")]
    for row in rows(gpu, outcomes):
        name = " " * row["indent"] + row["name"]
        if "failed" in row:
            reason = NOT_RUN if row["failed"] == NOT_RUN else f"failed: {row['failed']}"
            table.append((name, "", "", "", row["goal"], reason))
            continue
        limit = "" if row["limit"] is None else text_of(row["limit"], row["unit"])
        share = "" if row["share"] is None else f"{row['share']:.0%}"
        value, reached = text_of(row["value"], row["unit"]), "yes" if row["reached"] else "no"
        table.append((name, value, limit, share, row["goal"], reached))
    return aligned(table, "<>>>><")


def text_of(value, unit):
    """Return a figure with its unit.

    >>> text_of(3.9079, "ms"), text_of(2467.9, "tokens/s"), text_of(7, "families")
    ('3.91 ms', '2468 tokens/s', '7 families')
    """
    return f"{value:.0f} {unit}" if value >= 100 or isinstance(value, int) else f"{value:.3g} {unit}"
