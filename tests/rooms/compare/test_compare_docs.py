"""Check docs/compare.md: its names are steps, and its worked example prints the output shown."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys

import pytest
from paths import DOCS

from minitp.cli.main import main
from minitp.compare.run import TOLERANCES
from minitp.trace.names import AFTER, BEFORE, LAYER

PAGE = (DOCS / "compare.md").read_text(encoding="utf-8")
STEPS = BEFORE | {f"layers.{{i}}.{step}": letters for step, letters in LAYER.items()} | AFTER
MISSING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]


PYTORCH, OF_RANKS = PAGE.split("### Example: a file for each rank")


def blocks(language, text=PYTORCH):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_table_of_names_has_all_steps():
    rows = re.findall(r"^\| `([^`]+)` \| \[([^]]+)\] \|", PAGE, re.MULTILINE)
    assert {name: letters.replace(",", "") for name, letters in rows} == STEPS
    assert [name for name, _ in rows] == list(STEPS), "in the order in which they happen"


def test_the_tolerances_agree_with_the_code():
    rows = re.findall(r"^\| ([a-z0-9, ]+) \| ([0-9]e-[0-9]) \|", PAGE, re.MULTILINE)
    assert {name: float(value) for names, value in rows for name in names.split(", ")} == TOLERANCES


def masked(line):
    """Replace numbers and column widths, which may differ between two machines."""
    return re.sub(r"-?\d[\d.]*(e[-+]\d+)?|inf", "#", " ".join(line.split()))


def commands(block, capfd):
    """Run the commands of a block, which must print what is shown; yield each name and exit code."""
    for command, expected in re.findall(r"^\$ minitp (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
        if "DIR" in command:
            continue
        yield shlex.split(command)[0], main(shlex.split(command))
        printed = iter(map(masked, capfd.readouterr().out.splitlines()))
        for line in expected.splitlines():
            start, cut = masked(line.removesuffix("...")), line.endswith("...")
            assert any(each.startswith(start) if cut else each == start for each in printed), line


def test_the_example_of_ranks(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    traces, comparisons = blocks("console", OF_RANKS)
    assert list(commands(traces, capfd)) == [("trace", 0)] * 2
    (script,) = blocks("python", OF_RANKS)
    exec(script, {})
    assert list(commands(comparisons, capfd)) == [("compare", code) for code in (0, 1, 0, 0, 0)]


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_the_worked_example(tmp_path, monkeypatch, capfd):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    script = "\n".join(blocks("python"))
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    ran = [run for block in blocks("console") for run in commands(block, capfd)]
    assert ran == [("trace", 0), ("trace", 0), ("compare", 0), ("compare", 1)]
