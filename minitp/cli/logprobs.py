"""`minitp logprobs`: the log-probabilities of given tokens, next to those that other engines report."""

import json
import sys
from pathlib import Path

from minitp.cli.command import OnRanks
from minitp.cli.options import add_json, add_run
from minitp.errors import InputError
from minitp.util.format import counted
from minitp.util.stdout import write_out


class LogprobsCommand(OnRanks):
    """The command `minitp logprobs`."""

    name = "logprobs"
    inputs = "FILE.jsonl"
    summary = "compare log-probabilities of tokens with those of other engines"
    description = (
        "Print the log-probabilities of given tokens and how far those of other engines are from them. Each "
        "line of the file is a JSON object with token_ids, optionally prompt_token_ids, and any number of "
        "lists that have a number for each of the token_ids (or null), under names that end in logprobs."
    )
    examples = (
        ("minitp logprobs rollouts.jsonl --oracle", "the errors against the float64 oracle"),
        (
            "minitp logprobs rollouts.jsonl --oracle --json --tolerance 0.1",
            "all numbers as JSON; exit code 1 if one of the file's is off by more than 0.1",
        ),
    )

    def add_options(self, parser):
        parser.groups["input"].add_argument("file", metavar="FILE.jsonl", help="a file of JSON objects")
        parser.groups["comparison"].add_argument(
            "--oracle",
            action="store_true",
            help="compute the log-probabilities with the oracle, an independent float64 implementation, in "
            "one process (default: with the model on the ranks)",
        )
        parser.groups["comparison"].add_argument(
            "--tolerance",
            type=float,
            metavar="X",
            help="exit with code 1 if a log-probability differs by more than X (default: any difference)",
        )
        add_run(parser)
        add_json(parser)

    def ranks(self, args):
        """Return the number of ranks to start; the oracle has one."""
        return 1 if args.oracle else super().ranks(args)

    def prepare(self, args, source):
        """Return the lines of the file."""
        if args.tolerance is not None and not args.tolerance >= 0:
            raise InputError(f"--tolerance {args.tolerance}: expected 0 or a positive number")
        from minitp.cli.logprobs_file import read_lines

        return read_lines(Path(args.file), source.config)

    def run(self, args, comm, source, lines):
        """Print a table or one JSON object; return 1 if a difference exceeds the tolerance."""
        from tqdm import tqdm

        from minitp.cli.likelihood import log_likelihoods, oracle_log_likelihoods
        from minitp.cli.load_progress import load
        from minitp.trace.reference import open_oracle

        if args.oracle:
            oracle = open_oracle(source)
            compute = lambda ids: oracle_log_likelihoods(oracle, ids)  # noqa: E731
        else:
            model, _ = load(args, comm, source)
            compute = lambda ids: log_likelihoods(model, ids)  # noqa: E731
        hidden = comm.rank != 0 or not sys.stderr.isatty()
        for line in tqdm(lines, desc="logprobs", unit="line", leave=False, disable=hidden):
            if comm.rank == 0 or not args.oracle:
                line.expected = scored(line, compute)
        if comm.rank != 0:
            return comm.broadcast(None)
        result = {
            "model": str(source.name),
            "computed_by": "oracle, float64" if args.oracle else f"minitp, {model.device.dtype.name}",
            "lines": [line.result() for line in lines],
            "fields": totals(lines),
            "tolerance": args.tolerance,
        }
        largest = [one["max_abs_error"] or 0.0 for one in result["fields"].values()]
        result["ok"] = args.tolerance is None or all(error <= args.tolerance for error in largest)
        write_out(json.dumps(result) + "\n" if args.json else "\n".join(text_lines(result, lines)) + "\n")
        return comm.broadcast(0 if result["ok"] else 1)


def scored(line, compute):
    """Return the log-probability of each of a line's token_ids; None for a first token without a prompt."""
    ids = [*line.prompt_token_ids, *line.token_ids]
    found = compute(ids).tolist() if len(ids) > 1 else []
    return [None, *found][len(line.prompt_token_ids) :]


def totals(lines):
    """Return the errors of each field over all lines, by the field's name."""
    from minitp.cli.logprobs_file import errors_of

    names = dict.fromkeys(name for line in lines for name in line.fields)
    return {name: errors_of([pair for line in lines for pair in line.pairs(name)]) for name in names}


def text_lines(result, lines):
    """Return the result as lines of text."""
    from minitp.util.format import aligned

    rows = [
        ("line", "tokens", "log-likelihood", "field", "mean error", "mean |error|", "max |error|", "worst")
    ]
    for line, found in zip(lines, result["lines"], strict=True):
        head = str(line.number), str(len(line.token_ids)), number(found["log_likelihood"], 3)
        rows += [(*head, name, *errors_text(errors)) for name, errors in found["fields"].items()]
        if not found["fields"]:
            rows.append((*head, "", "", "", "", ""))
    text = [f"{result['model']}, computed by {result['computed_by']}", "", *aligned(rows, ">>><>>><"), ""]
    for name, errors in result["fields"].items():
        mean, absolute, largest, _ = errors_text(errors)
        tokens = counted(errors["count"], "token")
        text.append(f"{name}: {tokens}, mean error {mean}, mean |error| {absolute}, max |error| {largest}")
    if not result["fields"]:
        tokens = counted(sum(len(line.token_ids) for line in lines), "token")
        text.append(f"{tokens}; the file has no field whose name ends in logprobs, so nothing is compared")
    if not result["ok"]:
        text.append(f"an error exceeds the tolerance, {result['tolerance']:g}")
    return text


def errors_text(errors):
    """Return the cells of a row: the errors of a field, and its worst token."""
    cells = tuple(number(errors[name], 5) for name in ("mean_error", "mean_abs_error", "max_abs_error"))
    if errors["worst"] is None:
        return (*cells, "")
    index, token, found, expected = (
        errors["worst"][key] for key in ("index", "token_id", "found", "expected")
    )
    return (*cells, f"token {index} (id {token}): {number(found, 4)}, expected {number(expected, 4)}")


def number(value, digits):
    """Return a number with this many decimals; a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"
