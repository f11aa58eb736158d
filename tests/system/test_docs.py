"""The commands in docs/ print what stands there."""

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
HERE = {"guide": 5, "troubleshooting": 7, "check": 1, "performance": 2}  # page -> console blocks
FROM_A_CHECKOUT = {"adding-a-family": 8}
ON_TWO_HOSTS = {"several-nodes": 9}
ON_GPUS = {"gpus": 1}  # not run here
ELSEWHERE = {"serving": 2, "compare": 3}  # in test_serving_docs and test_compare_docs


def every_block(pages):
    return [
        pytest.param(block, id=f"{page}: {block.splitlines()[0][2:]}")
        for page in pages
        for block in blocks(page)
    ]


def environment():
    """With this Python's programs first, and what is installed, not what lies in the working directory."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def check(command, expected, cwd, **options):
    """It prints that, and succeeds if that is no error."""
    done = subprocess.run(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, **options
    )
    check_printed(done.stdout, expected)
    if not re.search(r"^(minitp|ssh): ", expected, re.MULTILINE):
        assert done.returncode == 0


def test_every_page_is_read():
    pages = HERE | FROM_A_CHECKOUT | ON_TWO_HOSTS | ON_GPUS | ELSEWHERE
    found = {page.stem: len(blocks(page.stem)) for page in DOCS.glob("*.md")}
    assert {page: count for page, count in found.items() if count} == pages


@pytest.mark.mpi
@pytest.mark.parametrize("block", every_block(HERE))
def test_it_prints_that(block, tmp_path):
    demo_directory()
    if "needs CuPy" in block and importlib.util.find_spec("cupy"):
        pytest.skip("CuPy is here")
    for command, expected in commands(block):
        check(["bash", "-c", command], expected, tmp_path, env=environment())


@pytest.mark.mpi
@pytest.mark.parametrize("block", every_block(FROM_A_CHECKOUT))
def test_it_prints_that_in_a_checkout(block):
    """Of tests only which there are: they run with the others. Goldens need torch, and a network."""
    if "/tmp/goldens/bin" in block:
        pytest.skip("makes goldens, with torch and transformers in an environment of its own")
    for command, expected in commands(block):
        if "-m pytest" in command:
            command, expected = f"{command} --collect-only -q", "tests/...py: ..."
        check(["bash", "-c", command], expected or "...", ROOT, env=environment())


@pytest.fixture(scope="module")
def first_host():
    """A command line as it is on the first of two hosts that have Slurm."""
    demo_directory()
    with hosts.two_hosts() as pair:
        found = slurm_hosts.start(pair, pair[0].folder)
        # TMPDIR is one that the hosts do not share, as they mostly do not share /tmp.
        yield lambda command, cwd: pair[0].inside("env", found, "TMPDIR=/run", "bash", "-c", command, cwd=cwd)


@pytest.mark.mpi
@pytest.mark.hosts
@pytest.mark.skipif(bool(slurm_hosts.missing()), reason=str(slurm_hosts.missing()))
@pytest.mark.parametrize("block", every_block(ON_TWO_HOSTS))
def test_it_prints_that_on_two_hosts(block, first_host, tmp_path):
    for command, expected in commands(block):
        check(first_host(command, tmp_path), expected, tmp_path)


def test_commands_within_the_text_are_commands():
    """With their options: those that are whole, and have arguments; and the commands for GPUs."""
    texts = [page.read_text(encoding="utf-8") for page in [*DOCS.glob("*.md"), ROOT / "README.md"]]
    found = {line for text in texts for line in re.findall(r"`minitp ([a-z]+ [^`]+)`", text)}
    found |= {
        command.removeprefix("minitp ")
        for page in ON_GPUS
        for block in blocks(page)
        for command, _ in commands(block)
        if command.startswith("minitp ")
    }
    whole = [line for line in sorted(found) if ".." not in line]
    for line in whole:
        words = shlex.split(line, comments=True)
        parser().parse_args(["1" if word == "N" else word for word in words])
    assert len(whole) > 10
