"""The rooms of the package and the imports between them, read from the syntax trees of its modules."""

import ast

from paths import ROOT

PACKAGE = ROOT / "minitp"

# A room is a folder or a module at the top of the package. It may import only from rooms before it.
ROOMS = [
    *["errors", "util", "device", "comm"],
    *["tensors", "shard", "ops", "rope", "moe", "kv_cache", "paged_cache", "model"],
    *["sampling", "text", "request", "generate"],
    *["loading", "cuda", "load"],
    *["launch", "engine"],
    *["oracle", "trace", "mapping", "probe", "check", "compare", "judge", "lint", "bits", "report"],
    *["llm", "server", "estimate", "bench", "tour", "cli", "__main__"],
]
ALONE = ["oracle", "tour"]  # rooms that import nothing from the rest of the package
CORE = ["ops", "shard", "comm/base", "comm/single", "model", "kv_cache", "generate"]  # the core path


def modules():
    """Return the syntax tree of each module by its name in the package, such as `comm.base` or `comm`."""
    trees = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def imports(tree, known):
    """Return the modules of the package that a syntax tree imports anywhere, also inside functions."""
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


def module_imports():
    """Return module -> the modules of the package that it imports."""
    trees = modules()
    return {name: imports(tree, trees) for name, tree in trees.items()}


def room(module):
    """Return the room that a module is in, "" for the package itself."""
    return module.split(".")[0]


def room_imports():
    """Return room -> the other rooms that it imports."""
    found = {name: set() for name in ROOMS}
    for module, others in module_imports().items():
        if module:
            found[room(module)] |= {room(other) for other in others} - {room(module)}
    return found


def without_shortcuts(arrows):
    """Return name -> set of names without each arrow that a path of other arrows replaces."""

    def reached(name):
        return arrows[name].union(*map(reached, arrows[name]))

    return {
        name: {other for other in others if not any(other in reached(middle) for middle in others)}
        for name, others in arrows.items()
    }
