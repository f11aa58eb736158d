"""The package as its floor plan says it is: imports run one way, and what tells the story stays short."""

import ast
from pathlib import Path

import pytest
from paths import TESTS

import minitp

ROOT = Path(minitp.__file__).parent

# From the ground up. A room is a folder or a module at the top; it may import only from rooms before it.
ROOMS = [
    *["errors", "util", "device", "comm"],
    *["tensors", "shard", "ops", "rope", "moe", "kv_cache", "paged_cache", "model"],
    *["sampling", "text", "request", "generate"],
    *["loading", "cuda", "load"],
    *["oracle", "trace", "check", "compare", "report"],
    *["launch", "engine", "llm", "server", "estimate", "bench", "tour", "cli", "__main__"],
]
ALONE = ["oracle", "tour"]  # which import nothing of the package but themselves
CORE = ["ops", "shard", "comm/base", "comm/single", "model", "kv_cache", "generate"]


def modules():
    """The syntax tree of each module, by its name within the package: `comm.base`; a package is `comm`."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(tree, known):
    """The modules of the package that a syntax tree imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("minitp.") in known else node.module for name in inner]
        found |= {name.removeprefix("minitp.") for name in names if name.startswith("minitp.")}
    return found


@pytest.fixture(scope="module")
def arrows():
    """Module -> the modules that it imports."""
    trees = modules()
    return {name: imports(tree, trees) for name, tree in trees.items()}


def room(module):
    return module.split(".")[0]


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
    assert len(list(ROOT.glob("*.py"))) <= 18


def test_the_core_path_is_short_enough_to_be_read():
    """What is between a prompt and its text, the way of a token: an hour's reading."""
    lines = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8").count("\n") for name in CORE}
    assert sum(lines.values()) < 1200, lines


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
