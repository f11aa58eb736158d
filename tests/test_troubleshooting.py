"""The commands of docs/troubleshooting.md print what stands there; `...` stands for anything."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minitp.demo import demo_directory

pytestmark = pytest.mark.mpi
DOCS = (Path(__file__).parent.parent / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```console\n(\$ .*?)```", DOCS, re.DOTALL)


def pattern(expected):
    return re.compile(r".*".join(map(re.escape, expected.split("..."))), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[block.split("\n")[0][2:] for block in BLOCKS])
def test_it_prints_that(block):
    demo_directory()
    command, expected = block.removeprefix("$ ").split("\n", 1)
    if "wants CuPy" in expected and importlib.util.find_spec("cupy"):
        pytest.skip("CuPy is here")
    minitp = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        ["bash", "-c", command],
        env={**environment, "PATH": minitp},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert pattern(expected).fullmatch(done.stdout), done.stdout


def test_there_are_some_for_each_kind_of_trouble():
    assert len(BLOCKS) == 7
