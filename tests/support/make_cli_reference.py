"""Write docs/cli.md from the parser, after a command or an option has changed.

python tests/support/make_cli_reference.py
"""

from paths import DOCS

from minitp.cli.arguments import parser
from minitp.cli.commands import SECTIONS

PAGE = DOCS / "cli.md"
START = """\
# The command line

`minitp COMMAND [options]` is the same as `python -m minitp COMMAND [options]`, and in a checkout as
`./run.sh COMMAND [options]`. Options must be written in full: an abbreviation could change its meaning when
an option is added.

<!-- tests/support/make_cli_reference.py writes this page from the commands' own help. -->
"""
END = """\
## Options of every command

| option | meaning |
|---|---|
| `-h`, `--help` | show the command's options and examples, and exit |
| `-v`, `--verbose` | show Python tracebacks and the ranks' stderr; `check`, `judge`, `lint`: each layer |
| `--version` | only without a command: show the version, and exit |

## Exit codes

| code | meaning |
|---|---|
| 0 | success, also if the reader of stdout exits early, as in `\\| head` |
| 1 | `check`, `judge` or `lint` found something wrong, or `compare` or `bits` a difference |
| 2 | bad usage or bad input; one line on stderr says what is wrong |
| 3 | a rank, MPI or a device failed; one line on stderr names the rank, and the other ranks are ended |
| 130 | ended by Ctrl-C |
| 143 | ended by SIGTERM (`serve` finishes its answers and exits with 0) |

Under your own `mpirun` or `srun`, the exit code is theirs, which may be a different one if a rank dies.

## Environment variables

| variable | effect |
|---|---|
| `MINITP_API_KEY` | `serve`: the key that clients must send, if `--api-key` is not given |
| `NO_COLOR` | if set and not empty, no colors on terminals |
| `XDG_CACHE_HOME` | the folder for the demo model and the history of `chat` (default: `~/.cache`) |
| `HF_HOME`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE` | Hugging Face's folder, its cache, and offline mode |
| `HF_TOKEN`, `HF_ENDPOINT` | the access token and address of the [hub](models.md#the-hugging-face-hub) |
| `CUDA_VISIBLE_DEVICES` | the GPUs that ranks may use |
| `OMP_NUM_THREADS` | BLAS threads of each rank (default: the cores of the host divided by its ranks) |
| `SLURM_CPUS_PER_TASK` | the same, set by Slurm |
| `TMPDIR` | the folder for the ranks' socket and their stderr while a command runs |
| `PMI_SIZE`, `OMPI_COMM_WORLD_SIZE`, `SLURM_STEP_NUM_TASKS` | set by MPI or Slurm for each rank |

`MINITP_SUPERVISOR`, `MINITP_ALONE`, `MINITP_REPLICA` and `MINITP_JOINED` are internal: minitp sets them for
its own ranks.
"""


def reference():
    """Return the text of docs/cli.md."""
    parsers = parser().commands
    parts = [START]
    for title, commands in SECTIONS.items():
        rows = [f"| [`{command.name}`](#{command.name}) | {command.summary} |" for command in commands]
        parts.append("\n".join([f"| {title} | |", "|---|---|", *rows]) + "\n")
    for commands in SECTIONS.values():
        parts += [section(command, parsers[command.name]) for command in commands]
    return "\n".join([*parts, END])


def section(command, sub):
    """Return the section of a command: what it does, its usage, its options by group, examples."""
    usage = sub.format_usage().removeprefix("usage: ").strip()
    lines = [f"## {command.name}", "", command.description, "", "```text", usage, "```", ""]
    lines += ["| option | meaning |", "|---|---|"]
    for title, group in sub.groups.items():
        actions = group._group_actions
        if actions and title != "general":
            lines.append(f"| **{title}** | |")
            lines += [f"| {spelled(action)} | {meaning(action)} |" for action in actions]
    lines += ["", "```sh"]
    for line, what in command.examples:
        lines += [f"# {what}", line]
    return "\n".join([*lines, "```", ""])


def spelled(action):
    """Return the syntax of an option or argument."""
    if not action.option_strings:
        return f"`{action.metavar}`"
    names = [f"`{name}`" for name in action.option_strings]
    if action.nargs != 0 and action.choices is None:
        names[-1] = f"`{action.option_strings[-1]} {action.metavar or action.dest.upper()}`"
    return ", ".join(names)


def meaning(action):
    """Return an option's help, with its choices."""
    choices = "" if action.choices is None else ", ".join(f"`{choice}`" for choice in action.choices) + ": "
    return (choices + action.help).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
