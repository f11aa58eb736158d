"""The package as its floor plan says it is: imports run one way, and what tells the story stays short."""

import ast
import importlib.util

import pytest
from package_imports import (
    ALONE,
    CORE,
    PACKAGE,
    ROOMS,
    imports,
    module_imports,
    room,
    room_imports,
    without_shortcuts,
)
from paths import DOCS, TESTS

DRAW = DOCS / "images/make_rooms.py"


@pytest.fixture(scope="module")
def arrows():
    """Return module -> the modules that it imports."""
    return module_imports()


def test_every_room_is_in_the_plan(arrows):
    assert sorted({room(module) for module in arrows} - {""}) == sorted(ROOMS)


def test_imports_run_one_way(arrows):
    height = {name: number for number, name in enumerate(ROOMS)}
    upwards = [
        f"{module} imports {other}"
        for module, others in arrows.items()
        for other in others
        if room(module) in height
        and room(module) != room(other)
        and height[room(module)] < height[room(other)]
    ]
    assert upwards == []


def test_no_modules_import_each_other_in_a_circle(arrows):
    """Also within a room: take away what imports nothing that is left, again and again."""
    left = {module: set(others) for module, others in arrows.items()}
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    assert left == {}


@pytest.mark.parametrize("name", ALONE)
def test_the_oracle_and_the_tour_stand_alone(arrows, name):
    for module, others in arrows.items():
        if room(module) == name:
            assert {room(other) for other in others} <= {name}


def test_the_top_level_is_short_enough_to_be_read():
    assert len(list(PACKAGE.glob("*.py"))) <= 18


def test_the_core_path_is_short_enough_to_be_read():
    """What is between a prompt and its text, the way of a token: an hour's reading."""
    lines = {name: (PACKAGE / f"{name}.py").read_text(encoding="utf-8").count("\n") for name in CORE}
    assert sum(lines.values()) < 1200, lines


@pytest.fixture(scope="module")
def drawing():
    """Return the module that draws docs/images/rooms.svg."""
    spec = importlib.util.spec_from_file_location("make_rooms", DRAW)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_has_every_room(drawing):
    assert sorted([*drawing.BOXES, *drawing.FLOOR, "__main__"]) == sorted(ROOMS)


def test_the_picture_has_the_real_imports(drawing):
    committed = DRAW.with_name("rooms.svg").read_text(encoding="utf-8")
    assert committed == drawing.picture(), "python docs/images/make_rooms.py draws it again"


def test_arrows_of_the_picture_lead_to_every_import():
    """The arrows lead from a room to all that it imports, directly or over other rooms."""
    real = room_imports()
    arrows = without_shortcuts(real)

    def reached(name):
        return arrows[name].union(*map(reached, arrows[name]))

    assert all(real[name] <= reached(name) for name in real)
    assert sum(map(len, arrows.values())) < sum(map(len, real.values()))


def test_an_arrow_that_others_replace_is_left_out():
    arrows = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert without_shortcuts(arrows) == {"a": {"b"}, "b": {"c"}, "c": set()}


def test_no_test_file_imports_another():
    """What they share is in tests/support."""
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not [name for name in names if name.startswith("test_")], path


def test_the_walk_would_see_what_it_looks_for():
    known = ["ops", "comm.base", "comm"]
    source = (
        "import minitp.comm.base, os\ndef f():\n    from minitp import comm\n    from minitp.ops import x"
    )
    assert imports(ast.parse(source), known) == {"comm.base", "comm", "ops"}
