"""Commands in a directory with files that have the names of modules, which no process may import."""

import os
import subprocess
import sys

import pytest
from paths import ROOT
from running import START_S, Running, result_of
from served import Served
from tiny import write_tiny

from minitp.util.run_module import RUN_MODULE

pytestmark = pytest.mark.mpi

# Modules of the standard library that Python itself, minitp or pip imports, and packages that minitp needs.
MODULES = """abc contextlib enum functools importlib inspect io json logging random re runpy selectors signal
    socket subprocess tempfile threading types typing warnings cupy ml_dtypes numpy safetensors tokenizers"""
PACKAGES = ["minitp", "mpi4py", "huggingface_hub", "jinja2", "tqdm", "uvicorn", "pip"]
TRAP = "raise SystemError(f'{__name__} was imported from the current directory')\n"
COMMAND = "import sys\nfrom minitp.cli.main import main\nsys.exit(main())\n"  # as pip installs it
SCRIPT = """
import sys
from minitp import LLM
with LLM(sys.argv[1], tp=2) as llm:
    print(llm.generate("Hello", max_new_tokens=4).token_ids)
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The minitp command, as a file in another directory than the current one."""
    path = tmp_path_factory.mktemp("bin") / "command"
    path.write_text(COMMAND)
    return [sys.executable, path]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def _traps(tmp_path, monkeypatch):
    """Make the current directory one that is full of traps."""
    for name in MODULES.split():
        (tmp_path / f"{name}.py").write_text(TRAP)
    for name in PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(TRAP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_the_traps_work():
    done = subprocess.run([sys.executable, "-m", "minitp", "info"], capture_output=True, text=True)
    assert "was imported from the current directory" in done.stderr


def test_generate(command, model):
    argv = ["generate", "Hello", "--model", model, "-n", "4", "--json", "--tp"]
    ids = [result_of(Running([*command, *argv, ranks]))["token_ids"] for ranks in (1, 2)]
    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["check", "Hello", "--decode", "1"], "all steps within bounds"),
        (["tour", "Hello", "-n", "2"], "Hello"),
    ],
)
def test_a_command_on_two_ranks(command, model, argv, expected):
    code, out, err = Running([*command, *argv, "--model", model, "--tp", 2]).end(START_S)
    assert (code, err) == (0, "")
    assert expected in out


def test_serve_starts(command, model):
    Served(model, "--tp", "2", command=command).stop()


def test_a_script_of_another_directory(model, tmp_path_factory):
    script = tmp_path_factory.mktemp("scripts") / "script.py"
    script.write_text(SCRIPT)
    code, out, err = Running([sys.executable, script, model]).end(START_S)
    assert (code, out.count("["), err) == (0, 1, "")


def test_info_asks_mpi(command):
    found = result_of(Running([*command, "info", "--json"]))
    assert "mpi4py" in found["mpi"], found["mpi"]


def test_pip_is_that_of_this_python():
    """`pip` downloads the demo model."""
    done = subprocess.run([*RUN_MODULE, "pip", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("pip "), done.stderr


@pytest.mark.skipif(sys.version_info < (3, 11), reason="PYTHONSAFEPATH is new in Python 3.11")
def test_python_adds_no_folder_itself(command, model):
    """Keep the first folder on sys.path with PYTHONSAFEPATH, since Python then adds none."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    argv = ["generate", "Hello", "--model", model, "-n", "4", "--tp", "2"]
    done = subprocess.run([*command, *argv], env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
