"""Tests of the layout of the package: imports run one way, and the core path stays short."""

import ast
from pathlib import Path

import pytest
from paths import TESTS

import minitp

ROOT = Path(minitp.__file__).parent

# The rooms from the bottom up. A room is a folder or a module of the top level; it imports only earlier ones.
ROOMS = [
    *["errors", "util", "device", "comm"],
    *["tensors", "shard", "ops", "rope", "moe", "kv_cache", "paged_cache", "model"],
    *["sampling", "text", "request", "generate"],
    *["loading", "cuda", "load"],
    *["oracle", "trace", "check", "compare", "report"],
    *["launch", "engine", "llm", "server", "estimate", "bench", "tour", "cli", "__main__"],
]
INDEPENDENT = ["oracle", "tour"]  # rooms that import nothing from other rooms
CORE = ["ops", "shard", "comm/base", "comm/single", "model", "kv_cache", "generate"]


def modules():
    """Return the syntax tree of each module, by its name within the package, such as `comm.base`."""
    trees = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def imports(tree, known):
    """Return the modules of the package that a syntax tree imports, also inside functions."""
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
def dependencies():
    """A dict from each module to the modules that it imports."""
    trees = modules()
    return {name: imports(tree, trees) for name, tree in trees.items()}


def room(module):
    return module.split(".")[0]


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


@pytest.mark.parametrize("name", INDEPENDENT)
def test_the_oracle_and_the_tour_import_no_other_room(dependencies, name):
    for module, others in dependencies.items():
        if room(module) == name:
            assert {room(other) for other in others} <= {name}


def test_the_top_level_has_few_modules():
    assert len(list(ROOT.glob("*.py"))) <= 18


def test_the_core_path_is_short():
    """The code from a prompt to its text can be read in an hour."""
    lines = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8").count("\n") for name in CORE}
    assert sum(lines.values()) < 1200, lines


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
