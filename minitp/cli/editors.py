"""Reading a message at a terminal: with prompt_toolkit, with readline, or with neither.

A pasted text of several lines is one message. With bracketed paste, the terminal marks where the text begins
and ends, and the editor inserts it into the message. A terminal without bracketed paste sends the lines as if
they were typed, only faster; see `more_input`.
"""

import os
import select
import sys
import termios
from contextlib import contextmanager, suppress

from minitp.cli.conversation import note
from minitp.errors import InputError
from minitp.loading.demo import cache_directory

PASTE_S = 0.05  # longest pause between the lines of a pasted text
KEPT_ENTRIES = 1000  # entries of the history file
PROMPT, CONTINUED = "> ", ". "
PASTED = "A pasted text of several lines is one message."
NEW_LINE = "Enter sends a message; Alt+Enter, or Esc and then Enter, starts a new line."


@contextmanager
def message_editor():
    """Yield the best editor that there is, with the history of earlier conversations."""
    entries = []
    try:
        path = cache_directory() / "chat-history"
    except InputError:  # there is no home directory
        yield choose_editor(entries)
        return
    with suppress(OSError):  # the history is missing or unreadable, which is no problem
        # A carriage return stands for a line's end within an entry; other lines are as readline writes them.
        lines = path.read_bytes().decode(errors="replace").split("\n")
        entries += [line.replace("\r", "\n") for line in lines if line]
    try:
        yield choose_editor(entries)
    finally:
        lines = [entry.replace("\n", "\r") + "\n" for entry in entries[-KEPT_ENTRIES:]]
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            path.write_bytes("".join(lines).encode(errors="replace"))


def choose_editor(entries):
    """Return an editor for the terminal; messages are appended to `entries`, the history."""
    if sys.stdout.isatty():
        for editor in [ReadlineEditor] if is_dumb_terminal() else [PromptToolkitEditor, ReadlineEditor]:
            with suppress(ImportError):
                return editor(entries)
    return PlainEditor(entries)


def is_dumb_terminal():
    """Return whether the terminal cannot move its cursor."""
    return os.environ.get("TERM", "dumb") in ("dumb", "unknown", "")


@contextmanager
def newline_at_exit():
    """Move to the next line of the terminal if Ctrl-C or Ctrl-D has been pressed."""
    try:
        yield
    except (EOFError, KeyboardInterrupt):
        note("")
        raise


class PlainEditor:
    """An editor that leaves editing to the terminal.

    Parameters
    ----------
    entries : list of str
        The history. Messages are appended to it.
    """

    help = f"{PASTED}\nNo key starts a new line in this terminal."

    def __init__(self, entries):
        self._entries = entries

    def read(self):
        """Return the next message; raise EOFError at Ctrl-D."""
        text = self._read()
        entry = text.rstrip()
        if entry and self._entries[-1:] != [entry]:
            self._entries.append(entry)
            self._remember(entry)
        return text

    @newline_at_exit()
    def _read(self):
        """Return the lines that belong together.

        Python's own reading would keep lines in its buffer, where `more_input` cannot see them.
        """
        if sys.stdout.isatty():
            print(PROMPT, end="", flush=True)
        read = b""
        while not read.endswith(b"\n") or more_input():
            more = os.read(sys.stdin.fileno(), 1 << 16)
            read += more
            if not more:
                break
        if not read:
            raise EOFError
        return read.decode(errors="replace")

    def _remember(self, entry):
        """Make an entry available to the keys that move through the history."""


class ReadlineEditor(PlainEditor):
    """An editor on top of Python's readline module, which may be GNU readline or libedit."""

    def __init__(self, entries):
        import readline

        super().__init__(entries)
        self._readline = readline
        readline.set_auto_history(False)  # it would make an entry of each line
        for entry in entries:
            readline.add_history(entry)
        if "libedit" not in readline.__doc__:
            readline.parse_and_bind(r'"\e\C-m": "\C-v\C-j"')
            if not is_dumb_terminal():
                readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off
            self.help = f"{NEW_LINE}\n{PASTED}"

    @newline_at_exit()
    def _read(self):
        lines = [input(PROMPT)]
        with suppress(EOFError):  # Ctrl-D ends the message
            while more_input():
                lines.append(input(CONTINUED))
        return "\n".join(lines)

    def _remember(self, entry):
        self._readline.add_history(entry)


class PromptToolkitEditor(PlainEditor):
    """An editor for messages of several lines, on top of prompt_toolkit."""

    help = f"{NEW_LINE}\n{PASTED}"

    def __init__(self, entries):
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import InMemoryHistory
        from prompt_toolkit.output import create_output

        super().__init__(entries)
        output = create_output()
        output.enable_cpr = False  # the terminal's reply would be taken for a pasted text
        self._session = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation=CONTINUED,
            key_bindings=key_bindings(),
            history=InMemoryHistory(entries),
            output=output,
            enable_suspend=True,
        )

    def _read(self):
        text = self._session.prompt()
        return text.encode(errors="surrogateescape").decode(errors="replace")


def key_bindings():
    """Return key bindings of prompt_toolkit: Enter sends a message, Alt+Enter starts a new line."""
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()

    @bindings.add("enter", filter=has_focus(DEFAULT_BUFFER))
    def send(event):
        if event.key_processor.input_queue or more_input():
            event.current_buffer.newline(copy_margin=False)
        else:
            event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter", filter=has_focus(DEFAULT_BUFFER))
    def start_line(event):
        event.current_buffer.newline(copy_margin=False)

    @bindings.add("tab", filter=has_focus(DEFAULT_BUFFER))
    def insert_tab(event):
        event.current_buffer.insert_text("\t")

    return bindings


def more_input():
    """Return whether more has been typed or pasted after the end of a line.

    It is too early for a new message, so it is another line of a pasted text, or it was typed during an
    answer. The two look alike, so lines typed during an answer are one message, too: one answer to several
    questions is better than an answer to each line of a text.
    """
    terminal = sys.stdin.fileno()
    before, settings = termios.tcgetattr(terminal), termios.tcgetattr(terminal)
    settings[3] &= ~termios.ICANON  # in this mode a last line without its end can be seen
    termios.tcsetattr(terminal, termios.TCSANOW, settings)
    try:
        return bool(select.select([terminal], [], [], PASTE_S)[0])
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)
