"""Tests of the layout of the package: imports run one way, and the core path stays short."""

import ast
import importlib.util
import re

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
def dependencies():
    """A dict from each module to the modules that it imports."""
    return module_imports()


def test_every_room_is_listed(dependencies):
    assert sorted({room(module) for module in dependencies} - {""}) == sorted(ROOMS)


def test_imports_run_one_way(dependencies):
    height = {name: number for number, name in enumerate(ROOMS)}
    upwards = [
        f"{module} imports {other}"
        for module, others in dependencies.items()
        for other in others
        if room(module) in height
        and room(module) != room(other)
        and height[room(module)] < height[room(other)]
    ]
    assert upwards == []


def test_no_import_cycles(dependencies):
    """Remove modules that import no remaining module until none is left, also within rooms."""
    remaining = {module: set(others) for module, others in dependencies.items()}
    while leaves := [module for module, others in remaining.items() if not others & remaining.keys()]:
        for module in leaves:
            del remaining[module]
    assert remaining == {}


@pytest.mark.parametrize("name", ALONE)
def test_the_oracle_and_the_tour_import_no_other_room(dependencies, name):
    for module, others in dependencies.items():
        if room(module) == name:
            assert {room(other) for other in others} <= {name}


def test_every_package_lists_its_files():
    missing = [
        str(file.relative_to(PACKAGE))
        for start in PACKAGE.rglob("__init__.py")
        for file in start.parent.glob("*.py")
        if not file.stem.startswith("__") and start.parent != PACKAGE
        if not re.search(rf"\b{file.stem}\b", start.read_text(encoding="utf-8"))
    ]
    assert missing == []


def test_the_top_level_has_few_modules():
    assert len(list(PACKAGE.glob("*.py"))) <= 18


def test_the_core_path_is_short():
    """The code from a prompt to its text can be read in an hour."""
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
    """Helpers that test files share are in tests/support."""
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not [name for name in names if name.startswith("test_")], path


def test_imports_finds_all_kinds_of_import():
    known = ["ops", "comm.base", "comm"]
    source = (
        "import minitp.comm.base, os\ndef f():\n    from minitp import comm\n    from minitp.ops import x"
    )
    assert imports(ast.parse(source), known) == {"comm.base", "comm", "ops"}
