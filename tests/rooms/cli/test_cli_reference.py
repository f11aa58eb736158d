"""The page docs/cli.md is current and has all commands, options and environment variables."""

import re

from make_cli_reference import PAGE, reference
from paths import ROOT

from minitp.cli.arguments import parser
from minitp.cli.commands import INTERNAL

TEXT = PAGE.read_text(encoding="utf-8")


def test_the_page_is_current():
    assert reference() == TEXT, "run python tests/support/make_cli_reference.py"


def test_every_command_has_a_section_with_all_of_its_options():
    internal = {command.name for command in INTERNAL}
    sections = dict(re.findall(r"^## ([a-z]+)\n(.*?)(?=^## )", TEXT, re.MULTILINE | re.DOTALL))
    assert sections.keys() == parser().commands.keys() - internal
    for name, text in sections.items():
        for option in parser().commands[name]._option_string_actions:
            if option not in ("-h", "--help", "-v", "--verbose"):
                assert re.search(rf"^\| .*`{option}[ `]", text, re.MULTILINE), (name, option)


def test_every_environment_variable_of_minitp_is_on_the_page():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "minitp").rglob("*.py")]
    found = {name for text in sources for name in re.findall(r"\"(MINITP_[A-Z_]+)\"", text)}
    internal = {"MINITP_SUPERVISOR", "MINITP_ALONE", "MINITP_JOINED", "MINITP_REPLICA"}
    assert found == {"MINITP_API_KEY"} | internal
    assert all(f"`{name}`" in TEXT for name in [*found, "NO_COLOR", "XDG_CACHE_HOME"])
