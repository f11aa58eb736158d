"""What README.md and run.sh promise is what there is."""

import re
import subprocess
import sys

import pytest
from paths import ROOT

from minitp.cli.arguments import parser

README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def help_of(capsys, *command):
    """What `minitp COMMAND --help` says."""
    with pytest.raises(SystemExit):
        parser().parse_args([*command, "--help"])
    return capsys.readouterr().out


def commands(capsys):
    """The names of the commands that `minitp --help` shows."""
    return re.findall(r"^    ([a-z]+)(?: |$)", help_of(capsys), re.MULTILINE)


@pytest.mark.parametrize("number", range(3))
def test_python_examples_run(number):
    done = subprocess.run([sys.executable, "-c", PYTHON_BLOCKS[number]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if number < 2:
        assert done.stdout.startswith(" Paris.\n")
    assert len(PYTHON_BLOCKS) == 3


def test_every_command_is_in_the_table_and_known_to_run_sh(capsys):
    passed_on = re.search(r'^commands="([^"]*)"', (ROOT / "run.sh").read_text(), re.MULTILINE)[1].split()
    assert sorted(commands(capsys)) == sorted(passed_on)
    for name in passed_on:
        assert f"| `minitp {name} " in README


def test_every_option_is_in_the_readme_and_every_option_of_the_readme_exists(capsys):
    texts = [help_of(capsys, name) for name in commands(capsys)]
    real = {
        option
        for text in texts
        for option in re.findall(r"^  (?:-\w.*, )?(--[a-z][a-z-]+)", text, re.MULTILINE)
    }
    # Not there: those named by their short form.
    real -= {"--help", "--max-new-tokens", "--verbose", "--output"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert named - {"--all"} == real  # which is `./run.sh test`'s


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README


def test_files_that_the_readme_links_to_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(links) > 5
    for link in links:
        assert (ROOT / link).exists(), link
