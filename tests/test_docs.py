"""The commands of docs/guide.md and docs/troubleshooting.md print what stands there; `...` is anything."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minitp.demo import demo_directory

pytestmark = pytest.mark.mpi
DOCS = Path(__file__).parent.parent / "docs"
BLOCKS = [
    pytest.param(block, id=f"{name}: {block.splitlines()[0][2:]}")
    for name in ("guide", "troubleshooting")
    for block in re.findall(
        r"```console\n(.*?)```", (DOCS / f"{name}.md").read_text(encoding="utf-8"), re.DOTALL
    )
]


def commands(block):
    """(command, what it prints), one after the other."""
    parts = re.split(r"^\$ (.*)\n", block, flags=re.MULTILINE)
    assert parts[0] == ""
    return zip(parts[1::2], parts[2::2], strict=True)


def pattern(expected):
    return re.compile(".*".join(map(re.escape, expected.split("..."))), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_it_prints_that(block, tmp_path):
    demo_directory()
    if "wants CuPy" in block and importlib.util.find_spec("cupy"):
        pytest.skip("CuPy is here")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for command, expected in commands(block):
        done = subprocess.run(
            ["bash", "-c", command],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert pattern(expected).fullmatch(done.stdout), done.stdout


def test_both_have_commands():
    assert len(BLOCKS) == 11
