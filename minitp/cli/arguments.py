"""The parser of the command line, built from `commands.COMMANDS`."""

import argparse
import textwrap
from itertools import takewhile

from minitp import __version__
from minitp.cli.commands import COMMANDS, SECTIONS
from minitp.errors import InputError
from minitp.util.stdout import write_out
from minitp.util.suggest import did_you_mean

GROUPS = (
    "input",
    "server",
    "sampling",
    "steps",
    "comparison",
    "estimate",
    "measurement",
    "batching",
    "model",
    "ranks",
    "output",
    "general",
)
DESCRIPTION = """\
Tensor-parallel LLM inference in NumPy and MPI, with every step checkable against a reference.

A rank is a process that holds a part of the model. A forward pass runs the model on some tokens: on a \
prompt, or on the newest token. A step is a named intermediate array of a forward pass, for example \
layers.0.attn.q."""
MORE = """\
minitp COMMAND --help shows the options of a command. The file docs/cli.md in minitp's repository also lists \
exit codes and environment variables."""
EXAMPLES = (
    ('minitp generate "Once upon a time"', "continue a text with the demo model"),
    ('minitp check "Once upon a time" --tp 4', "check every step of four ranks against float64"),
    ("minitp plan --model random:mistral-7b --gpu h100", "see whether a model fits, and how fast it will be"),
)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """A formatter that wraps paragraphs at the terminal's width and keeps indented lines as they are."""

    def _fill_text(self, text, width, indent):
        return "\n".join(
            line if line.startswith(" ") else textwrap.fill(line, width, break_on_hyphens=False)
            for line in text.splitlines()
        )


class Parser(argparse.ArgumentParser):
    """A parser that shows its options in GROUPS and raises InputError for an invalid command line.

    Attributes
    ----------
    groups : dict
        The argparse group of each title. Help does not show groups without options.
    """

    def __init__(self, *, examples=(), more=None, **options):
        super().__init__(
            epilog="\n\n".join(filter(None, (examples_text(examples), more))),
            formatter_class=HelpFormatter,
            add_help=False,
            allow_abbrev=False,  # an abbreviation in a script may mean another option after an update
            **options,
        )
        self.groups = {title: self.add_argument_group(title) for title in GROUPS}
        self.groups["general"].add_argument("-h", "--help", action="help", help="show this help and exit")

    def parse_known_args(self, args=None, namespace=None):
        """Reject unknown options first, before argparse reports required options that are missing."""
        if not {"-h", "--help", "--version"}.intersection(self.own_words(args)):
            self.check_words(args)
        return super().parse_known_args(args, namespace)

    def check_words(self, args):
        """Raise InputError for an unknown option."""
        for word in self.own_words(args):
            option = word.partition("=")[0]
            if word.startswith("--") and " " not in word and option not in self._option_string_actions:
                self.reject_option(option)

    def own_words(self, args):
        """Return the arguments before `--`, which are the only ones that can be options."""
        return takewhile(lambda word: word != "--", args)

    def reject_option(self, option):
        """Raise InputError for an option that this command does not have."""
        meant = did_you_mean(option, [name for name in self._option_string_actions if len(name) > 2])
        question = f"; did you mean {meant}?" if meant else ""
        self.error(f"unrecognized option {option}{question}")

    def error(self, message):
        raise InputError(f"{message} (see {self.prog} --help)")

    def _print_message(self, message, file=None):
        """Print help or the version; a closed stdout is no error."""
        write_out(message)


class CommandLine(Parser):
    """The parser of `minitp` and all of its commands."""

    def __init__(self):
        super().__init__(
            prog="minitp",
            usage="%(prog)s COMMAND [options]",
            description=f"{DESCRIPTION}\n\n{commands_text()}",
            examples=EXAMPLES,
            more=MORE,
        )
        self.groups["general"].add_argument(
            "--version", action="version", version=f"minitp {__version__}", help="show the version and exit"
        )
        self.commands = {}
        found = self.add_subparsers(
            dest="command", metavar="COMMAND", help=argparse.SUPPRESS, parser_class=Parser
        )
        for name, command in COMMANDS.items():
            sub = found.add_parser(
                name,
                prog=f"minitp {name}",
                usage=" ".join(filter(None, ("%(prog)s", command.inputs, "[options]"))),
                description=command.description,
                examples=command.examples,
            )
            command.add_options(sub)
            sub.groups["general"].add_argument(
                "-v", "--verbose", action="store_true", help=command.verbose or argparse.SUPPRESS
            )
            self.commands[name] = sub

    def own_words(self, args):
        """Return the arguments before the command."""
        return takewhile(lambda word: word.startswith("-"), args)

    def check_words(self, args):
        """Raise InputError for an unknown option before the command, or an unknown command."""
        super().check_words(args)
        name = next((word for word in args if not word.startswith("-")), None)
        if name is not None and name not in COMMANDS:
            shown = [command.name for commands in SECTIONS.values() for command in commands]
            meant = "generate" if " " in name else did_you_mean(name, shown)
            self.error(f"unknown command {name!r}" + (f"; did you mean {meant}?" if meant else ""))

    def parse_args(self, args=None, namespace=None):
        """Return the parsed command line; raise InputError if it is invalid."""
        found, unknown = self.parse_known_args(args, namespace)
        if found.command is None:
            self.error('no command given; try minitp generate "Once upon a time"')
        unknown = [word for word in unknown if word != "--"]
        if unknown:
            sub = self.commands[found.command]
            if unknown[0].startswith("-"):
                sub.reject_option(unknown[0])
            quotes = "; put a text of several words in quotes" if hasattr(found, "prompt") else ""
            sub.error(f"unexpected argument {unknown[0]!r}{quotes}")
        return found


def commands_text():
    """Return the list of commands for `minitp --help`."""
    sections = [
        [f"{title}:", *(f"  {command.name:<12}{command.summary}" for command in commands)]
        for title, commands in SECTIONS.items()
    ]
    return "\n\n".join("\n".join(lines) for lines in sections)


def examples_text(examples):
    """Return the examples at the end of a help text."""
    if not examples:
        return None
    lines = [f"  {line}\n      {what}" for line, what in examples]
    return "\n".join(["examples:" if len(examples) > 1 else "example:", *lines])


def parser():
    """Return the parser of `minitp` and all of its commands."""
    return CommandLine()
