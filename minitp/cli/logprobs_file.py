"""The file of `minitp logprobs`: lines of token ids with the log-probabilities that engines report."""

import json
import math
from dataclasses import dataclass, field
from typing import NamedTuple

from minitp.errors import InputError, shown
from minitp.request import check_vocabulary
from minitp.util.files import why_unreadable
from minitp.util.format import counted

SUFFIX = "logprobs"  # end of the names of fields with log-probabilities


@dataclass
class ScoredLine:
    """A line of the file.

    Attributes
    ----------
    number : int
        Its number in the file, from 1.
    prompt_token_ids, token_ids : list of int
    fields : dict of str to list
        The log-probabilities of token_ids that the file has, by name; None where it has none.
    expected : list of float or None
        The computed log-probabilities; None for a first token without a prompt.
    """

    number: int
    prompt_token_ids: list
    token_ids: list
    fields: dict
    expected: list = field(default_factory=list)

    def pairs(self, name):
        """Return a Pair for each token with both numbers."""
        numbers = zip(self.token_ids, self.fields.get(name, ()), self.expected, strict=False)
        return [
            Pair(self.number, index, token, found, expected)
            for index, (token, found, expected) in enumerate(numbers)
            if None not in (found, expected)
        ]

    def result(self):
        """Return the line as a JSON object."""
        known = [value for value in self.expected if value is not None]
        return {
            "line": self.number,
            "logprobs": self.expected,
            "log_likelihood": sum(known),
            "fields": {name: errors_of(self.pairs(name)) for name in self.fields},
        }


class Pair(NamedTuple):
    """A token's log-probability in the file and the computed one."""

    line: int
    index: int
    token_id: int
    found: float
    expected: float

    @property
    def error(self):
        return self.found - self.expected


def errors_of(pairs):
    """Return the mean error of some Pairs, its mean and maximum absolute value, and the worst Pair.

    Without any pair, all but the count are None.
    """
    if not pairs:
        return dict.fromkeys(("mean_error", "mean_abs_error", "max_abs_error", "worst")) | {"count": 0}
    worst = max(pairs, key=lambda pair: abs(pair.error))
    return {
        "count": len(pairs),
        "mean_error": math.fsum(pair.error for pair in pairs) / len(pairs),
        "mean_abs_error": math.fsum(abs(pair.error) for pair in pairs) / len(pairs),
        "max_abs_error": abs(worst.error),
        "worst": worst._asdict(),
    }


def read_lines(path, config):
    """Return a ScoredLine for each line of a file that is not empty.

    Raises
    ------
    InputError
        If the file cannot be read, or a line does not have the form; the message names the line.
    """
    try:
        texts = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise InputError(f"{path}: {why_unreadable(path, error)}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error}") from error
    lines = []
    for number, text in enumerate(texts, start=1):
        if text.strip():
            lines.append(parse_line(text, number, f"{path}, line {number}", config))
    if not lines:
        raise InputError(f"{path}: the file is empty; give a JSON object with token_ids on each line")
    return lines


def parse_line(text, number, where, config):
    """Return the ScoredLine of a line of text; `where` names it in errors."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {' '.join(str(error).split())[:100]}") from error
    if not isinstance(fields, dict) or not is_ids(fields.get("token_ids")) or not fields["token_ids"]:
        raise InputError(f"{where}: expected a JSON object with token_ids, a list of token ids")
    prompt, ids = fields.get("prompt_token_ids") or [], fields["token_ids"]
    if not is_ids(prompt):
        raise InputError(f"{where}: prompt_token_ids {shown(prompt)}: expected a list of token ids")
    try:
        check_vocabulary([*prompt, *ids], config)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    length, context = len(prompt) + len(ids), config.max_position_embeddings
    if length > context:
        raise InputError(f"{where}: {counted(length, 'token')} exceed the model's context of {context}")
    given = {name: values for name, values in fields.items() if name.endswith(SUFFIX) and values is not None}
    for name, values in given.items():
        if not isinstance(values, list) or not all(is_logprob(value) for value in values):
            raise InputError(f"{where}: {name} {shown(values)}: expected a list of numbers up to 0, or null")
        if len(values) != len(ids):
            raise InputError(
                f"{where}: {name} has {counted(len(values), 'number')} for {counted(len(ids), 'token')} in "
                "token_ids; give one for each, or null"
            )
    return ScoredLine(number, prompt, ids, given)


def is_ids(value):
    return isinstance(value, list) and all(type(one) is int for one in value)


def is_logprob(value):
    """Return whether a value is a log-probability, up to rounding, or None; NaN is not one."""
    return value is None or (type(value) in (int, float) and value <= 0.01)
