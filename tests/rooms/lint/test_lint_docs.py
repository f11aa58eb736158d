"""Check that the example of docs/lint.md prints what the page shows, and names what the page lists."""

import re
import shlex

from doc_commands import blocks, check_printed, commands
from paths import DOCS

from minitp.cli.main import main
from minitp.loading.demo import demo_directory

PAGE = (DOCS / "lint.md").read_text(encoding="utf-8")


def test_the_worked_example(tmp_path, monkeypatch, capsys):
    demo_directory()
    monkeypatch.chdir(tmp_path)
    spoil = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[0]
    codes = []
    for number, block in enumerate(blocks("lint")):
        if number == 1:
            exec(spoil, {})
        for command, expected in commands(block):
            codes.append(main(shlex.split(command)[1:]))
            check_printed(capsys.readouterr().out, expected)
    assert codes == [0, 0, 1]
