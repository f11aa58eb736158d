"""The input of `minitp chat`: a terminal with line editing and commands, or a pipe."""

import re
import signal
import sys
from contextlib import contextmanager

from minitp.cli.conversation import note
from minitp.cli.editors import message_editor
from minitp.util.format import counted

HELP = """\
/help   show this
/reset  forget the conversation so far
/exit   leave (or press Ctrl-D)
Ctrl-C stops an answer; the part that was printed stays in the conversation.
To send a message that begins with a slash, put a space before it.
"""


def line_by_line(conversation):
    """Answer each line of stdin."""
    for line in sys.stdin:
        if line.strip() and not conversation.say(line.strip()):
            return


def at_terminal(conversation):
    """Read messages and commands until the user leaves or stdout is closed."""
    if sys.stderr.isatty():
        note(banner(conversation.llm))
    with message_editor() as editor, on_ctrl_c(clear_line):
        for text in typed_messages(editor):
            if "\n" not in text and text.startswith("/"):
                if text == "/exit":
                    return
                obey(text, conversation, editor)
            elif text:
                with on_ctrl_c(conversation.interrupt):
                    if not conversation.say(text if "\n" in text else text.lstrip()):
                        return


def obey(command, conversation, editor):
    """Run a command other than /exit."""
    if command == "/help":
        note(HELP + editor.help)
    elif command == "/reset":
        conversation.reset()
        note("[conversation reset]")
    else:
        note(f"{command.split()[0]} is not a command; /help lists the commands")


def clear_line():
    """Raise KeyboardInterrupt, which `typed_messages` handles."""
    raise KeyboardInterrupt


def banner(llm):
    """Return the lines to print before a conversation."""
    about = llm.description
    return (
        f"{llm.source.name} on {counted(about['tp'], 'rank')}, {about['dtype']}, context {about['context']}\n"
        "/help for help; Ctrl-C stops an answer, Ctrl-D leaves"
    )


def typed_messages(editor):
    """Yield what is typed until Ctrl-D, or Ctrl-C twice in a row; a single Ctrl-C clears the message.

    Blank lines around a message are removed. The indentation of its first line stays, because it may be code.
    """
    interrupted = False
    while True:
        try:
            text = editor.read()
            interrupted = False
            yield re.sub(r"\A\s*\n", "", text.rstrip())
        except EOFError:
            return
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            note("press Ctrl-C again, or Ctrl-D, to leave")


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
