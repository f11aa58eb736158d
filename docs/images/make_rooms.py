"""Draw rooms.svg: the rooms of the package as boxes, and the imports between them as arrows.

`python docs/images/make_rooms.py` reads the imports from the syntax trees of all modules. An arrow that a
path of other arrows replaces is left out, and so are those to `errors` and `util`, which nearly every room
imports. The places of the boxes are chosen by hand. An arrow must lead to a lower row and may not cross a
box, or the script refuses to draw.
"""

import sys
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests/support"))

from package_imports import ALONE, CORE, room_imports, without_shortcuts

# Room -> (row from the top, column, width in columns, caption).
BOXES = {
    "cli": (0, 0, 8, "the commands"),
    "server": (1, 0, 1, "HTTP"),
    "llm": (1, 1, 1, "the Python API"),
    "bits": (1, 2, 1, "bit for bit"),
    "bench": (1, 3, 1, "measures speed"),
    "lint": (1, 4, 1, "checks shards"),
    "judge": (1, 5, 1, "another engine"),
    "compare": (2, 5, 1, "two traces"),
    "report": (1, 6, 1, "HTML pages"),
    "tour": (1, 7, 1, "all in one file"),
    "check": (3, 5, 1, "judges the steps"),
    "probe": (2, 7, 1, "records steps"),
    "mapping": (3, 7, 1, "other engines"),
    "engine": (4, 0, 3.25, "many requests: scheduler, blocks, prefix cache"),
    "estimate": (4, 3.25, 1.25, "predicts, for plan"),
    "trace": (5, 4.5, 3.5, "the steps of a forward pass, by name"),
    "generate": (6, 0, 1, "prompt to tokens"),
    "launch": (6, 1, 1.25, "starts the ranks"),
    "load": (6, 2.25, 1, "makes a Model"),
    "request": (7, 0, 1, "one continuation"),
    "cuda": (7, 1, 2.75, "GPUs: NCCL, graphs, the fused model"),
    "oracle": (7, 6, 2, "the same model in float64"),
    "sampling": (8, 0, 0.87, "the next token"),
    "model": (8, 1, 2, "one rank's forward pass"),
    "comm": (8, 3, 0.87, "collectives"),
    "loading": (8, 4.5, 3.5, "--model: config, files, one rank's weights"),
    "paged_cache": (9, 1, 1, "blocks of a pool"),
    "moe": (9, 2, 1, "experts"),
    "rope": (9, 3, 0.87, "frequencies"),
    "shard": (9, 4, 1, "sharding plan"),
    "device": (9, 6, 2, "NumPy or CuPy, and a dtype"),
    "kv_cache": (10, 1, 1, "keys and values"),
    "ops": (10, 2, 1, "all operations"),
    "tensors": (10, 4, 1, "how each is cut"),
    "text": (11, 0, 8, "tokenizer, chat template, stop strings"),
}
FLOOR = ("errors", "util")
# Where an arrow leaves and enters, in columns, if not in the middle of what its two boxes have in common.
PORTS = {
    ("bits", "compare"): (2.5, 5.2),
    ("bench", "trace"): (3.75, 4.7),
    ("lint", "compare"): (4.8, 5.2),
    ("bench", "estimate"): (3.5, 3.5),
    ("estimate", "shard"): (4.2, 4.2),
    ("check", "engine"): (5.2, 2.9),
    ("check", "trace"): (5.43, 5.43),
    ("report", "trace"): (6.43, 6.43),
    ("trace", "generate"): (4.9, 0.6),
    ("trace", "loading"): (5.43, 5.43),
    ("cuda", "loading"): (3.5, 4.7),
    ("request", "text"): (0.72, 0.935),
    ("request", "sampling"): (0.37, 0.37),
    ("model", "rope"): (2.8, 3.43),
    ("loading", "shard"): (4.7, 4.7),
    ("loading", "text"): (5.43, 5.43),
}

WIDTH, MARGIN, PITCH, GAP = 960, 16, 118, 16  # in pixels; PITCH is a column with the gap after it
BOX, STEP, TOP, ROUND = 44, 76, 16, 7  # a box's height, that of a row, and the radius of corners
STYLE = """
  svg { --paper: #fdfdfb; --ink: #1c2330; --soft: #5c6675; --line: #8a94a3; --box: #f1f2f0; --edge: #c9ced6;
    --core: #dbe8fa; --core-edge: #5b8dd6; --judge: #d9eeea; --judge-edge: #3f958a; }
  @media (prefers-color-scheme: dark) { svg { --paper: #14181f; --ink: #e8ebf0; --soft: #a3adba;
    --line: #74808f; --box: #20262f; --edge: #3d4653; --core: #1d3557; --core-edge: #6ea2ea;
    --judge: #173b38; --judge-edge: #52b3a6; } }
  text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: var(--ink);
    text-anchor: middle; }
  .name { font-size: 13.5px; font-weight: 600; }
  .caption { font-size: 11px; fill: var(--soft); }
  .key { text-anchor: start; }
  .paper { fill: var(--paper); }
  rect { fill: var(--box); stroke: var(--edge); }
  .core { fill: var(--core); stroke: var(--core-edge); }
  .judge { fill: var(--judge); stroke: var(--judge-edge); }
  .alone { stroke-dasharray: 5 3; stroke-width: 1.4; }
  .arrow { fill: none; stroke: var(--line); stroke-width: 1.3; }
  .head { fill: var(--line); }
"""
JUDGES = ("bits", "judge", "lint", "compare", "report", "check", "probe", "mapping", "trace", "oracle")


def arrows():
    """Return (importing room, imported room) of all arrows in the picture, sorted."""
    drawn = {name: others - set(FLOOR) for name, others in room_imports().items() if name in BOXES}
    return sorted((name, other) for name, others in without_shortcuts(drawn).items() for other in others)


def area(name):
    """Return the left, top, right and bottom edge of a room's box, in pixels."""
    row, column, width, _ = BOXES[name]
    left, top = MARGIN + PITCH * column, TOP + STEP * row
    return left, top, left + PITCH * width - GAP, top + BOX


def route(source, target):
    """Return the corners of an arrow's line, from the bottom of one box to the top of another."""
    left, _, right, bottom = area(source)
    low, top, high, _ = area(target)
    if (source, target) in PORTS:
        start, end = (MARGIN + PITCH * column for column in PORTS[source, target])
    elif max(left, low) < min(right, high):
        start = end = (max(left, low) + min(right, high)) / 2
    else:
        start, end = (left + right) / 2, (low + high) / 2
    turn = bottom + (STEP - BOX) / 2
    corners = [(start, bottom), (start, turn), (end, turn), (end, top)]
    return [corners[0], corners[-1]] if start == end else corners


def crossed(source, target):
    """Return the boxes that an arrow's line touches on its way."""
    corners = route(source, target)
    found = set()
    for (x0, y0), (x1, y1) in pairwise(corners):
        for name in BOXES.keys() - {source, target}:
            left, top, right, bottom = area(name)
            if max(x0, x1) >= left and min(x0, x1) <= right and max(y0, y1) >= top and min(y0, y1) <= bottom:
                found.add(name)
    return found


def path(corners):
    """Return the `d` of a line with rounded corners."""
    (x, y), (end_x, end_y) = corners[0], corners[-1]
    drawn = f"M{x:g} {y:g}"
    for before, (x, y), after in zip(corners, corners[1:], corners[2:], strict=False):
        near = x + ROUND * sign(before[0] - x), y + ROUND * sign(before[1] - y)
        far = x + ROUND * sign(after[0] - x), y + ROUND * sign(after[1] - y)
        drawn += f"L{near[0]:g} {near[1]:g}Q{x:g} {y:g} {far[0]:g} {far[1]:g}"
    return f"{drawn}L{end_x:g} {end_y - 5:g}"


def sign(number):
    """Return -1, 0 or 1."""
    return (number > 0) - (number < 0)


def box(name, edges, caption, looks=""):
    """Return the SVG of a box with a name and a caption."""
    left, top, right, bottom = edges
    middle, size = (left + right) / 2, f'width="{right - left:g}" height="{bottom - top:g}"'
    shape = f'<rect class="{looks}" x="{left:g}" y="{top:g}" {size} rx="6"/>'
    words = f'<text class="name" x="{middle:g}" y="{top + 18.5:g}">{name}</text>'
    return f'{shape}{words}<text class="caption" x="{middle:g}" y="{top + 35:g}">{caption}</text>'


def looks(name):
    """Return the classes of a room's box."""
    core = name in {module.split("/")[0] for module in CORE}
    return " ".join(["core"] * core + ["judge"] * (name in JUDGES) + ["alone"] * (name in ALONE))


def picture():
    """Return the SVG."""
    parts = []
    for source, target in arrows():
        if BOXES[source][0] >= BOXES[target][0]:
            raise SystemExit(f"{source} imports {target}, which is not below it; move a box")
        if boxes := crossed(source, target):
            raise SystemExit(f"the arrow from {source} to {target} crosses {boxes}; move it")
        corners = route(source, target)
        x, y = corners[-1]
        said = f"<title>{source} imports {target}</title>"
        parts.append(f'<path class="arrow" d="{path(corners)}">{said}</path>')
        parts.append(f'<path class="head" d="M{x:g} {y:g}l-3.6 -7h7.2z"/>')
    parts += [box(name, area(name), BOXES[name][3], looks(name)) for name in BOXES]
    floor = TOP + STEP * (1 + max(row for row, *_ in BOXES.values()))
    edges = MARGIN, floor, WIDTH - MARGIN, floor + BOX
    parts.append(box(" · ".join(FLOOR), edges, "imported by nearly every room; these arrows are left out"))
    y = floor + BOX + 28
    keys = [("core", "on the core path, at least in part"), ("judge", "checks a run, step by step")]
    keys.append(("alone", "imports nothing else from minitp"))
    x = MARGIN
    for kind, meaning in keys:
        parts.append(f'<rect class="{kind}" x="{x}" y="{y - 11}" width="22" height="14" rx="3"/>')
        parts.append(f'<text class="caption key" x="{x + 30}" y="{y}">{meaning}</text>')
        x += 70 + 6 * len(meaning)
    height = y + 16
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    title = "<title>The rooms of minitp and the imports between them, which all lead downwards</title>"
    paper = f'<rect class="paper" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="10"/>'
    return "\n".join([head, title, f"<style>{STYLE}</style>", paper, *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("rooms.svg").write_text(picture(), encoding="utf-8")
