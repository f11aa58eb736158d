"""Tests of the examples, commands and links in README.md, of run.sh, and of the architecture example."""

import re
import subprocess
import sys

import pytest
from paths import DOCS, ROOT

from minitp.cli.arguments import parser
from minitp.cli.commands import COMMANDS, INTERNAL

README = (ROOT / "README.md").read_text(encoding="utf-8")
RUN_SH = (ROOT / "run.sh").read_text(encoding="utf-8")
ARCHITECTURE = (DOCS / "architecture.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README + ARCHITECTURE, re.DOTALL)


@pytest.mark.parametrize("block", PYTHON_BLOCKS)
def test_python_examples_run(block):
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if "print" in block:
        assert done.stdout.startswith(" Paris.\n")
    assert len(PYTHON_BLOCKS) == 3


def test_run_sh_knows_every_command():
    passed_on = re.search(r'^commands="([^"]*)"', RUN_SH, re.MULTILINE)[1].split()
    assert sorted(passed_on) == sorted(COMMANDS.keys() - {command.name for command in INTERNAL})


def test_commands_and_options_of_the_readme_exist():
    """Check the ones that the README mentions; docs/cli.md has all of them."""
    assert set(re.findall(r"`minitp ([a-z]+)", README)) <= COMMANDS.keys()
    real = {option for sub in parser().commands.values() for option in sub._option_string_actions}
    run_sh = set(re.findall(r"--[a-z][a-z-]+", RUN_SH))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert "--tp" in named
    assert named - run_sh <= real


def test_no_placeholders_are_left():
    assert "@@" not in README


def test_files_that_the_readme_links_to_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(links) > 5
    for link in links:
        assert (ROOT / link).exists(), link
