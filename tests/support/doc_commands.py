"""The commands in the console blocks of a page, and the output shown there; `...` stands for any text."""

import re

from paths import DOCS


def blocks(page):
    """Return the console blocks of docs/PAGE.md."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(r"```console\n(.*?)```", text, re.DOTALL)


def commands(block):
    """Return (command, expected output) of each command in a block."""
    parts = re.split(r"^\$ (.*)\n", block, flags=re.MULTILINE)
    assert parts[0] == "", parts[0]
    return zip(parts[1::2], parts[2::2], strict=True)


def check_printed(printed, expected):
    """Check a command's output against the page's."""
    pattern = ".*".join(map(re.escape, expected.split("...")))
    assert re.fullmatch(pattern, printed, re.DOTALL), printed
