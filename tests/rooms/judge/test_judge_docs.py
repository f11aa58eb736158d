"""Check the worked example of docs/judge.md, which needs PyTorch and transformers."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from doc_commands import blocks, check_printed, commands
from paths import DOCS, SUPPORT

from minitp.cli.main import main

MISSING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
PAGE = (DOCS / "judge.md").read_text(encoding="utf-8")


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_the_worked_example(tmp_path, monkeypatch, capsys):
    script = "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True, timeout=300)
    monkeypatch.chdir(tmp_path)
    codes = []
    for block in blocks("judge"):
        for command, expected in commands(block):
            codes.append(main(shlex.split(command)[1:]))
            check_printed(capsys.readouterr().out, expected)
    assert codes == [0, 1, 1, 1, 1]


def test_the_explanations_of_the_page_are_those_of_recorded_faults():
    """Check, without PyTorch, that the faults of the page are among the recordings."""
    words = [case["words"] for case in json.loads((SUPPORT / "faulty_recordings.json").read_text()).values()]
    found = re.findall(r"^what it seems to compute: (.*)$", PAGE, re.MULTILINE)
    assert len(found) == 5
    cases = json.loads((SUPPORT / "rank_recordings.json").read_text())
    assert cases["kv of rank 0"]["words"] in found.pop()
    for text in found[:3]:
        assert any(one in text for one in words), text
    assert f"Of the {len(words)} faults" in " ".join(PAGE.split())
    faults = [case for case in cases.values() if case["step"] is not None]
    assert f"Of the {len(faults)} faults in transformers on two ranks" in " ".join(PAGE.split())
