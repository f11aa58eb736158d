"""Tests that the commands in docs/ print what the pages show."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import hosts
import pytest
import slurm_hosts
from doc_commands import DOCS, blocks, check_printed, commands

from minitp.cli.arguments import parser
from minitp.loading.demo import demo_directory

ROOT = DOCS.parent
# The number of console blocks on each page.
ANYWHERE = {"bits": 1, "guide": 6, "troubleshooting": 7, "check": 2, "performance": 2}
FROM_A_CHECKOUT = {"adding-a-family": 8}
ON_TWO_HOSTS = {"several-nodes": 9}
NEEDS_GPUS = {"gpus": 2}  # pages whose commands are only parsed
# In test_serving_docs, test_clients and test_.._docs.
IN_OTHER_TESTS = {"serving": 5, "compare": 5, "judge": 2, "lint": 2}


def every_block(pages):
    return [
        pytest.param(block, id=f"{page}: {block.splitlines()[0][2:]}")
        for page in pages
        for block in blocks(page)
    ]


def environment():
    """Return an environment that prefers this Python's programs and the installed packages."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return variables | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def check(command, expected, cwd, **options):
    """Check that a command prints the expected text, and succeeds unless that text is an error message."""
    done = subprocess.run(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, **options
    )
    check_printed(done.stdout, expected)
    if not re.search(r"^(minitp|ssh): ", expected, re.MULTILINE):
        assert done.returncode == 0


def test_every_page_with_commands_is_tested():
    pages = ANYWHERE | FROM_A_CHECKOUT | ON_TWO_HOSTS | NEEDS_GPUS | IN_OTHER_TESTS
    found = {page.stem: len(blocks(page.stem)) for page in DOCS.glob("*.md")}
    assert {page: count for page, count in found.items() if count} == pages


@pytest.mark.mpi
@pytest.mark.parametrize("block", every_block(ANYWHERE))
def test_commands_print_what_the_page_shows(block, tmp_path):
    demo_directory()
    if "needs CuPy" in block and importlib.util.find_spec("cupy"):
        pytest.skip("CuPy is installed")
    for command, expected in commands(block):
        check(["bash", "-c", command], expected, tmp_path, env=environment())


@pytest.mark.mpi
@pytest.mark.parametrize("block", every_block(FROM_A_CHECKOUT))
def test_commands_in_a_checkout_print_what_the_page_shows(block):
    """Run the commands in the checkout; only collect tests, and skip goldens, which need torch."""
    if "/tmp/goldens/bin" in block:
        pytest.skip("makes goldens with torch and transformers in a separate environment")
    for command, expected in commands(block):
        if "-m pytest" in command:
            command, expected = f"{command} --collect-only -q", "tests/...py: ..."
        check(["bash", "-c", command], expected or "...", ROOT, env=environment())


@pytest.fixture(scope="module")
def first_host():
    """Return a function that wraps a command line to run on the first of two hosts with Slurm."""
    demo_directory()
    with hosts.two_hosts() as pair:
        found = slurm_hosts.start(pair, pair[0].folder)
        # TMPDIR is a folder that the hosts do not share, because real hosts rarely share /tmp.
        yield lambda command, cwd: pair[0].inside("env", found, "TMPDIR=/run", "bash", "-c", command, cwd=cwd)


@pytest.mark.mpi
@pytest.mark.hosts
@pytest.mark.skipif(bool(slurm_hosts.missing()), reason=str(slurm_hosts.missing()))
@pytest.mark.parametrize("block", every_block(ON_TWO_HOSTS))
def test_commands_on_two_hosts_print_what_the_page_shows(block, first_host, tmp_path):
    for command, expected in commands(block):
        check(first_host(command, tmp_path), expected, tmp_path)


def test_commands_in_the_text_and_for_gpus_are_valid():
    """Parse the commands that are complete and have arguments."""
    texts = [page.read_text(encoding="utf-8") for page in [*DOCS.glob("*.md"), ROOT / "README.md"]]
    found = {line for text in texts for line in re.findall(r"`minitp ([a-z]+ [^`]+)`", text)}
    for_gpus = [command for page in NEEDS_GPUS for block in blocks(page) for command, _ in commands(block)]
    found |= {command.removeprefix("minitp ") for command in for_gpus if command.startswith("minitp ")}
    complete = [line for line in sorted(found) if ".." not in line]
    for line in complete:
        words = shlex.split(line, comments=True)
        parser().parse_args(["1" if word == "N" else word for word in words])
    assert len(complete) > 10
