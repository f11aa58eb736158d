"""A way to run a module in another process without the current directory on its sys.path.

    python .../minitp/util/run_module.py minitp generate "Hi"      as python -m minitp generate "Hi"

`python -m` and `python -c` import from the current directory first, so a user's inspect.py or numpy.py there
would be imported instead of the real one, and Python 3.10 has no option against it. When Python runs a file,
the file's folder is first on sys.path; it is removed before anything is imported.
"""

import sys

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False):
    del sys.path[0]

import importlib.util
import runpy
from pathlib import Path

RUN_MODULE = [sys.executable, str(Path(__file__).absolute())]  # the command line before a module's name


def import_package(folder):
    """Import the package `folder`, even if sys.path leads to another one, or to none."""
    spec = importlib.util.spec_from_file_location(
        folder.name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    package = sys.modules[folder.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)


if __name__ == "__main__":
    import_package(Path(__file__).absolute().parent.parent)  # the minitp of the process that started this one
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
