"""The input of `minitp chat`: a terminal with line editing and commands, or a pipe."""

import signal
import sys
from contextlib import contextmanager, suppress

from minitp.cli.conversation import note
from minitp.errors import InputError
from minitp.loading.demo import cache_directory
from minitp.util.format import counted

KEPT_LINES = 1000  # lines of the history file
HELP = """\
/help   show this
/reset  forget the conversation so far
/exit   leave (or press Ctrl-D)
Ctrl-C stops an answer; the part that was printed stays in the conversation.
To send a message that begins with a slash, put a space before it."""


def line_by_line(conversation):
    """Answer each line of stdin."""
    for line in sys.stdin:
        if line.strip() and not conversation.say(line.strip()):
            return


def at_terminal(conversation):
    """Read messages and commands until the user leaves or stdout is closed."""
    if sys.stderr.isatty():
        note(banner(conversation.llm))
    with line_editing(), on_ctrl_c(clear_line):
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
                note(f"{command.split()[0]} is not a command; /help lists the commands")
            elif command:
                with on_ctrl_c(conversation.interrupt):
                    if not conversation.say(line.strip()):
                        return


def clear_line():
    """Raise KeyboardInterrupt, which `typed_lines` handles."""
    raise KeyboardInterrupt


def banner(llm):
    """Return the lines to print before a conversation."""
    about = llm.description
    return (
        f"{llm.source.name} on {counted(about['tp'], 'rank')}, {about['dtype']}, context {about['context']}\n"
        "/help for help; Ctrl-C stops an answer, Ctrl-D leaves"
    )


def typed_lines():
    """Yield typed lines until Ctrl-D, or Ctrl-C twice in a row; a single Ctrl-C clears the line."""
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
            note("press Ctrl-C again, or Ctrl-D, to leave")


@contextmanager
def line_editing():
    """Enable line editing and a history across conversations, if Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    try:
        path = cache_directory() / "chat-history"
    except InputError:  # there is no home directory
        yield
        return
    readline.set_history_length(KEPT_LINES)
    with suppress(OSError):  # the history is missing or unreadable, which is no problem
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
    """Call `act` on Ctrl-C within a `with` block.

    A KeyboardInterrupt instead could cut off a message to the ranks.
    """
    before = signal.signal(signal.SIGINT, lambda number, frame: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
