"""The result of `check` or `compare` as an HTML page that needs no network and no other file.

The style, the scripts and the data, as JSON, are inserted into `page.html`. The data is not trusted: prompts
and names in a trace may contain markup, and a broken kernel may produce NaN. So the JSON has no character
that could end its <script>, NaN and infinities are written as strings, and the page's content security policy
forbids it to fetch anything.
"""

import html
import json
import math
import os
import re
from importlib.resources import files
from pathlib import Path

from minitp.errors import InputError
from minitp.trace import names as steps

# The scripts, in the order in which they run.
SCRIPTS = (
    "data.js",
    "head.js",
    "map.js",
    "details.js",
    "layer.js",
    "growth.js",
    "plan.js",
    "start.js",
)
ERROR_DIGITS, VALUE_DIGITS = 3, 9  # significant digits; 9 of them tell any two float32 apart
MARKUP = {ord(c): f"\\u{ord(c):04x}" for c in "<>&"}  # in JSON these characters occur only in strings


def write_report(path, data):
    """Write the page for `data` (see `render`) to `path`; on failure an existing file is left unchanged.

    Raises
    ------
    InputError
        if the file cannot be written.
    """
    path = Path(path)
    page = render(data)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(page, encoding="utf-8", newline="\n")
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"{path}: cannot write the report: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def render(data):
    """Return the page as text, in which all characters from `data` are ASCII.

    Parameters
    ----------
    data : dict
        command, title, verdict : str
        ok : bool
        facts : list of (str, str); problems : list of str
        passes : list of str, in order
        tp : int, or None if there are no ranks (`compare`)
        layers : int
        before, steps, after : lists of the names of the steps before, within and after the layers
        cells : list of dict, one for each step of a pass on a rank: pass (index), layer (or None), step, rank
            (or None for all), kind, ok, local, total, worst, note. `local` and `total` are None or dicts with
            relative, bound, absolute, absolute_bound, index, value, expected; any of these may be missing.
            `worst` is a list of (index, value, expected); if it is empty, the element of the local error, or
            else of the total error, replaces it. A step that was not recorded has no cell.
        blamed : index into cells, or None
        explained : dict of step to [shape, formula, operation, sentence], see `report.steps`
        plan : None or the sharding plan in plain numbers

    Raises
    ------
    ValueError
        if a cell names a step that is in none of the three lists.
    """
    packed = {key: value for key, value in data.items() if key != "cells"}
    packed["cells"] = _pack_cells(data)
    packed["axes"] = steps.BEFORE | steps.LAYER | steps.AFTER
    text = json.dumps(_plain(packed), allow_nan=False, separators=(",", ":")).translate(MARKUP)
    verdict = f"{'Passed' if data['ok'] else 'Failed'}: {data['verdict']}"
    fill = {"title": _escape(data["title"]), "verdict": _escape(verdict), "data": text}
    fill["command"] = data["command"]
    fill |= {"style": _part("style.css"), "script": "\n".join(map(_part, SCRIPTS))}
    # Fill in everything in one pass, because the data may contain such marks, too.
    return re.sub(r"@@([a-z]+)@@", lambda match: fill[match[1]], _part("page.html"))


def _part(name):
    return files(__package__).joinpath(name).read_text("utf-8")


def _pack_cells(data):
    """Return the cells as short lists, because there may be tens of thousands of them.

    Each is [pass, row, column, rank, kind, ok, local, total, worst, note]. The rows are the steps before the
    layers, the layers, and the steps after them.
    """
    before, after = len(data["before"]), len(data["before"]) + data["layers"]
    place = {(None, name): (row, 0) for row, name in enumerate(data["before"])}
    place |= {(None, name): (after + row, 0) for row, name in enumerate(data["after"])}
    columns = {name: column for column, name in enumerate(data["steps"])}
    packed = []
    for cell in data["cells"]:
        layer, step = cell["layer"], cell["step"]
        if layer is not None and step in columns:
            row, column = before + layer, columns[step]
        elif (layer, step) in place:
            row, column = place[layer, step]
        else:
            raise ValueError(f"the report has no place for the step {step!r}, layer {layer}")
        rank = None if isinstance(cell["rank"], str) else cell["rank"]  # "all" is not a particular rank
        own = cell["local"] or cell["total"] or {}
        worst = cell["worst"]
        if not worst and "index" in own:
            worst = [[own[key] for key in ("index", "value", "expected")]]
        worst = [[index, _short(v, VALUE_DIGITS), _short(e, VALUE_DIGITS)] for index, v, e in worst]
        errors = _pack_error(cell["local"]), _pack_error(cell["total"])
        place_and_kind = cell["pass"], row, column, rank, cell["kind"], int(bool(cell["ok"]))
        packed.append([*place_and_kind, *errors, worst, cell["note"] or ""])
    return packed


def _pack_error(error):
    """Return an error as [relative, bound, absolute, absolute_bound, index]."""
    if error is None:
        return None
    sizes = [_short(error.get(k), ERROR_DIGITS) for k in ("relative", "bound", "absolute", "absolute_bound")]
    return [*sizes, error.get("index")]


def _short(number, digits):
    """Round a number of any numeric type to a float of `digits` significant digits; None stays None."""
    if number is None:
        return None
    number = float(number)
    return float(f"{number:.{digits}g}") if math.isfinite(number) else number


def _plain(value):
    """Convert `value` to types that JSON has: NumPy types and tuples are replaced, and NaN and infinities."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "inf" if value > 0 else "-inf"
        return int(value) if value.is_integer() and abs(value) < 1e15 else value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return [_plain(item) for item in value]


def _escape(text):
    """Escape text for HTML, in ASCII; browsers show the reference to a lone surrogate as U+FFFD."""
    return html.escape(text).encode("ascii", "xmlcharrefreplace").decode()
