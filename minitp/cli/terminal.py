"""Reading the messages of `minitp chat`: from a terminal with line editing and commands, or from a pipe."""

import signal
import sys
from contextlib import contextmanager, suppress

from minitp.cli.conversation import note
from minitp.loading.demo import cache_directory
from minitp.util.format import counted

KEPT_LINES = 1000  # lines of the history file
HELP = """\
/help   show this
/reset  forget the conversation so far
/exit   leave, as Ctrl-D does
Ctrl-C stops an answer; the model remembers the part that it has said.
A line with a space before its / is a message."""


def line_by_line(conversation):
    """Answer each line of stdin."""
    for line in sys.stdin:
        if line.strip() and not conversation.say(line.strip()):
            return


def at_terminal(conversation):
    """Read messages and commands until the user leaves, or no one reads the answers."""
    if sys.stderr.isatty():
        note(banner(conversation.llm))
    with line_editing():
        for line in typed_lines():
            command = line.rstrip()
            if command == "/exit":
                return
            if command == "/help":
                note(HELP)
            elif command == "/reset":
                conversation.reset()
                note("[conversation reset]")
            elif command.startswith("/"):
                note(f"{command.split()[0]} is not a command; /help lists them")
            elif command:
                with on_ctrl_c(conversation.interrupt):
                    if not conversation.say(line.strip()):
                        return


def banner(llm):
    """Return the lines at the beginning of a conversation."""
    about = llm.description
    return (
        f"{llm.source.name} on {counted(about['tp'], 'rank')}, {about['dtype']}, context {about['context']}\n"
        "/help for help; Ctrl-C stops an answer, Ctrl-D leaves"
    )


def typed_lines():
    """Yield the lines that the user types, up to Ctrl-D or two Ctrl-C in a row; the first clears a line."""
    interrupted = False
    while True:
        try:
            line = input("> " if sys.stdout.isatty() else "")
            interrupted = False
            yield line
        except EOFError:
            note("")
            return
        except KeyboardInterrupt:
            note("")
            if interrupted:
                raise
            interrupted = True
            note("Ctrl-C again, or Ctrl-D, leaves")


@contextmanager
def line_editing():
    """Let the user edit lines and recall those of earlier conversations, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    path = cache_directory() / "chat-history"
    readline.set_history_length(KEPT_LINES)
    with suppress(OSError):  # no history yet, or not a readable one: chat works without
        readline.read_history_file(path)
    try:
        yield
    finally:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.write_history_file(path)


@contextmanager
def on_ctrl_c(act):
    """Let Ctrl-C call `act`; a KeyboardInterrupt could come in the middle of a message to the ranks."""
    before = signal.signal(signal.SIGINT, lambda number, frame: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
