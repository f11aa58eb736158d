"""The result of `check` or `compare` as one HTML page that needs no network and no other file.

The page is `page.html` beside this file, with the style, the scripts and the data, as JSON, written into it.
Everything in the data may come from elsewhere (a prompt, the names in somebody's dump, NaN out of a broken
kernel), so nothing of it is trusted: the JSON holds no character that could end its <script>, NaN and
infinities travel as strings, and the page's own policy forbids it to fetch anything.
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

SCRIPTS = ("data.js", "map.js", "details.js", "plan.js", "start.js")  # in the order in which they run
ERROR_DIGITS, VALUE_DIGITS = 3, 9  # significant ones; 9 tell any two float32 apart
MARKUP = {ord(c): f"\\u{ord(c):04x}" for c in "<>&"}  # in JSON these occur in strings only


def write_report(path, data):
    """Write the page for `data` (see `render`) to `path`, or leave what is there untouched.

    Raises
    ------
    InputError
        if the file cannot be written.
    """
    path = Path(path)
    page = render(data)
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(page, encoding="utf-8", newline="\n")
        os.replace(beside, path)
    except OSError as error:
        raise InputError(f"{path}: cannot write the report: {error.strerror}") from error
    finally:
        beside.unlink(missing_ok=True)


def render(data):
    """The page as text; what comes from `data` is ASCII only.

    Parameters
    ----------
    data : dict
        command, title, verdict : str
        ok : bool
        facts : list of (str, str); problems : list of str
        passes : list of str, in order
        tp : int, or None where there are no ranks (`compare`)
        layers : int
        before, steps, after : lists of the names of the steps before, within and behind the layers
        cells : list of dict, one for each step of a pass on a rank: pass (index), layer (or None), step, rank
            (or None for all), kind, ok, and local, total, worst, note. `local` and `total` are None or dicts
            of relative, bound, absolute, absolute_bound, index, value, expected, of which any may be missing;
            `worst` is a list of (index, value, expected); where it is empty the local error's own element, or
            the total one's, stands in. A step that was not recorded has no cell.
        blamed : index into cells, or None
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
    fill |= {"style": _part("style.css"), "script": "\n".join(map(_part, SCRIPTS))}
    return re.sub(r"@@([a-z]+)@@", lambda match: fill[match[1]], _part("page.html"))  # once: not within data


def _part(name):
    return files(__package__).joinpath(name).read_text("utf-8")


def _pack_cells(data):
    """The cells as short lists, since there may be tens of thousands of them.

    [pass, row, column, rank, kind, ok, local, total, worst, note], where the rows are the steps before the
    layers, the layers, and the steps behind them.
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
        rank = None if isinstance(cell["rank"], str) else cell["rank"]  # "all": none of them in particular
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
    """[relative, bound, absolute, absolute_bound, index]."""
    if error is None:
        return None
    sizes = [_short(error.get(k), ERROR_DIGITS) for k in ("relative", "bound", "absolute", "absolute_bound")]
    return [*sizes, error.get("index")]


def _short(number, digits):
    """A number of any numeric type as a float with so many significant digits; None stays None."""
    if number is None:
        return None
    number = float(number)
    return float(f"{number:.{digits}g}") if math.isfinite(number) else number


def _plain(value):
    """`value` as JSON can hold it: NumPy's scalars and arrays, tuples, NaN and infinities replaced."""
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
    """Text for HTML, ASCII only; a lone surrogate becomes a reference that browsers show as U+FFFD."""
    return html.escape(text).encode("ascii", "xmlcharrefreplace").decode()
