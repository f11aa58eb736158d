"""The result of `check` or `compare` as an HTML page that needs no network and no other file.

The style, the scripts and the data, as JSON, are inserted into `page.html`. The data is not trusted: prompts
and names in a trace may contain markup, and a broken kernel may produce NaN. So the JSON has no character
that could end its <script>, NaN and infinities are written as strings, and the page's content security policy
forbids it to fetch anything.
"""

import base64
import html
import json
import math
import os
import re
from importlib.resources import files
from pathlib import Path

from minitp.errors import InputError
from minitp.report.steps import LETTERS

# The scripts, in the order in which they run.
SCRIPTS = (
    "data.js",
    "head.js",
    "thumbs.js",
    "map.js",
    "pictures.js",
    "details.js",
    "layer.js",
    "growth.js",
    "plan.js",
    "start.js",
)
ERROR_DIGITS, VALUE_DIGITS = 3, 9  # significant digits; 9 of them tell any two float32 apart
MANY = 20_000  # with more cells than this, those within bounds do not name their worst elements
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
            else of the total error, replaces it. A step that was not recorded has no cell. The pass of a
            tensor of the checkpoint is None, its step is its general name, and `name` its full name.
        blamed : index into cells, or None
        explained : dict of step to [shape, formula, operation, sentence, source], see `report.steps`
        plan : None or the sharding plan in plain numbers

        These may be missing:

        weights : list of the general names of the tensors in each layer, see `report.weights`
        beside : dict of step to the tensor next to it, for steps outside the layers
        readers : dict of a tensor's general name to the step that reads it
        warnings : list of str
        diagnosis : str, the likely cause of what `blamed` shows
        everywhere : bool, whether `blamed` is wrong on all ranks
        compared : int, the number of comparisons, if several share a cell
        pictures : dict of an index into cells to a `compare.picture.Picture`

    Raises
    ------
    ValueError
        if a cell names a step that is in none of the three lists.
    """
    packed = {key: value for key, value in data.items() if key != "cells"}
    packed["cells"] = _pack_cells(data)
    packed["pictures"] = {i: _pack_picture(picture) for i, picture in data.get("pictures", {}).items()}
    packed["axes"] = LETTERS
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

    Each is [pass, row, column, rank, kind, ok, local, total, worst, note], and then the name of a tensor if
    its column does not give it. The rows are the steps before the layers, the layers, and the steps after
    them. The tensors have the first columns.
    """
    place = _places(data)
    many = len(data["cells"]) > MANY
    packed = []
    for cell in data["cells"]:
        where = cell["layer"] is not None, cell["step"]
        if where not in place:
            raise ValueError(f"the report has no place for the step {cell['step']!r}, layer {cell['layer']}")
        row, column = place[where]
        row += cell["layer"] or 0
        rank = None if isinstance(cell["rank"], str) else cell["rank"]  # "all" is not a particular rank
        brief = many and cell["ok"]
        worst = [] if brief else _worst(cell)
        errors = _pack_error(cell["local"], brief), _pack_error(cell["total"], brief)
        place_and_kind = cell["pass"], row, column, rank, cell["kind"], int(bool(cell["ok"]))
        name = cell.get("name", "")
        named = [name] if cell["step"].count("*") > 1 else []
        packed.append([*place_and_kind, *errors, worst, cell["note"] or "", *named])
    return packed


def _places(data):
    """Return (whether in a layer, name) -> (row, column), for layers the row of the first one."""
    weights, beside = data.get("weights", []), data.get("beside", {})
    first = len(data["before"])
    wide = [*enumerate(data["before"]), *enumerate(data["after"], first + data["layers"])]
    column = len(weights) if data["steps"] else 0  # the first column of the steps
    place = {(False, name): (row, column) for row, name in wide}
    place |= {(False, beside[name]): (row, 0) for row, name in wide if name in beside}
    return place | {(True, name): (first, i) for i, name in enumerate([*weights, *data["steps"]])}


def _worst(cell):
    """Return up to a few elements of a cell as [index, value, expected], the worst first."""
    own, worst = cell["local"] or cell["total"] or {}, cell["worst"]
    if not worst and "index" in own:
        worst = [[own[key] for key in ("index", "value", "expected")]]
    return [[index, _short(v, VALUE_DIGITS), _short(e, VALUE_DIGITS)] for index, v, e in worst]


def _pack_picture(picture):
    """Return a Picture as [shape, scale, rms, rows, columns, A, B, difference], the arrays in base64."""
    arrays = picture.a, picture.b, picture.difference
    sizes = [_short(x, ERROR_DIGITS) for x in (picture.scale, picture.rms)]
    texts = [base64.b64encode(array.tobytes()).decode() for array in arrays]
    return [picture.shape, *sizes, *picture.a.shape, *texts]


def _pack_error(error, brief):
    """Return an error as [relative, bound, absolute, absolute_bound, index], the index unless `brief`."""
    if error is None:
        return None
    sizes = [_short(error.get(k), ERROR_DIGITS) for k in ("relative", "bound", "absolute", "absolute_bound")]
    return [*sizes, None if brief else error.get("index")]


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
