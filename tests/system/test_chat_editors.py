"""The editors of `minitp chat` in a terminal: a pasted text is one message, whatever editor there is."""

import json
import sys
import termios
import time
from pathlib import Path
from threading import Thread

import pytest
from paths import SUPPORT
from running import END_S
from terminal import Terminal

CODE = "def f(x):\n    if x:\n\n\treturn x\n    return 0"
LIBEDIT = "/usr/lib/x86_64-linux-gnu/libedit.so.2"

PAUSE_S = 0.25  # a pause in typing, longer than any in a pasted text

# The environment and the modules that are not installed.
EDITORS = {
    "prompt_toolkit": ({"TERM": "xterm"}, []),
    "readline": ({"TERM": "xterm"}, ["prompt_toolkit"]),
    "readline on a dumb terminal": ({}, []),
    "libedit": ({"TERM": "xterm", "LD_PRELOAD": LIBEDIT}, ["prompt_toolkit"]),
    "plain": ({"TERM": "xterm"}, ["prompt_toolkit", "readline"]),
    "stdout is a file": ({"TERM": "xterm"}, []),
}
BRACKETED = ["prompt_toolkit", "readline"]
WITH_NEW_LINE_KEY = [*BRACKETED, "readline on a dumb terminal"]


class EchoChat(Terminal):
    """A chat without a model, in a terminal."""

    def __init__(self, editor, folder):
        environment, missing = EDITORS[editor]
        stdout = folder / "stdout" if editor == "stdout is a file" else None
        super().__init__([sys.executable, SUPPORT / "echo_chat.py", *missing], folder, stdout, **environment)
        self.until("Ctrl-D leaves\r\n")

    def paste(self, text):
        """Send a text as a terminal without bracketed paste does."""
        self.type(text.replace("\n", "\r"))

    def paste_bracketed(self, text):
        self.paste(f"\x1b[200~{text}\x1b[201~")

    def said(self):
        """Return the next message that the chat has received."""
        self.until("SAID")
        return json.loads(self.until("\r\n"))

    def type_at_prompt(self, keys):
        """Send keys when the editor, which is not the plain one, waits for them."""
        deadline = time.monotonic() + END_S
        while termios.tcgetattr(self.theirs)[0] & termios.ICRNL:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        self.type(keys)

    def leave(self):
        """End the chat with Ctrl-D at the prompt."""
        time.sleep(PAUSE_S)
        self.type("\x04")
        assert self.end(END_S)[0] == 0


@pytest.fixture
def start(tmp_path):
    """Start a chat without a model, with an editor."""
    started = []

    def start(editor):
        if LIBEDIT in EDITORS[editor][0].values() and not Path(LIBEDIT).exists():
            pytest.skip("libedit is not installed")
        if editor == "prompt_toolkit":
            pytest.importorskip("prompt_toolkit")
        started.append(EchoChat(editor, tmp_path))
        return started[-1]

    yield start
    for terminal in started:
        terminal.close()


@pytest.fixture
def history(tmp_path):
    """The path of the history file."""
    return tmp_path / "minitp" / "chat-history"


@pytest.mark.parametrize("editor", EDITORS)
def test_lines_that_arrive_together_are_one_message(start, history, editor):
    terminal = start(editor)
    terminal.paste(CODE)
    time.sleep(PAUSE_S)
    terminal.type("\r")  # the last line has waited for it
    assert terminal.said() == CODE
    terminal.paste("\n \n    return 0\n\n    return 1\n\n")
    assert terminal.said() == "    return 0\n\n    return 1"
    terminal.paste("/exit\nis a command\n")
    assert terminal.said() == "/exit\nis a command"

    terminal.type("wait\r")
    assert terminal.said() == "wait"
    terminal.type("\x03")
    terminal.until("STOPPED")
    terminal.type("slow\r")
    assert terminal.said() == "slow"
    terminal.type("typed\r")
    terminal.type(" during an answer\r")
    assert terminal.said() == "typed\n during an answer"

    terminal.paste("cleared\ncleared")
    time.sleep(PAUSE_S)
    terminal.type("\x03")
    terminal.until("press Ctrl-C again")
    terminal.type("  kept \r")
    assert terminal.said() == "kept"
    terminal.leave()
    messages = [CODE, "\n \n    return 0\n\n    return 1", "/exit\nis a command", "wait", "slow"]
    messages += ["typed\n during an answer", "  kept"]
    written = [line.replace("\r", "\n") for line in history.read_bytes().decode().split("\n")]
    assert written == [*messages, ""]


@pytest.mark.parametrize("editor", BRACKETED)
def test_bracketed_paste(start, editor):
    terminal = start(editor)
    terminal.until("\x1b[?2004h")  # the editor asks for it
    for text in (CODE, "/exit\nis a command", "\n    return 0\n\n    return 1\n"):
        terminal.paste_bracketed(text)
        time.sleep(PAUSE_S)
        terminal.type("\r")
        assert terminal.said() == text.strip("\n")


@pytest.mark.parametrize("editor", ["prompt_toolkit", "readline"])
def test_a_long_text_without_bracketed_paste(start, editor):
    """The text does not fit the terminal's buffer, so lines arrive while others are read."""
    text = "\n".join(f"{number} {'x' * 70}" for number in range(100))
    terminal = start(editor)
    sender = Thread(target=terminal.paste, args=[text + "\n"])
    sender.start()
    assert terminal.said() == text
    sender.join()


@pytest.mark.parametrize("editor", WITH_NEW_LINE_KEY)
def test_keys_that_start_a_new_line(start, editor):
    terminal = start(editor)
    terminal.type("/help\r")
    assert "Alt+Enter, or Esc and then Enter, starts a new line" in terminal.until("A pasted text of several")
    terminal.type_at_prompt("Alt\x1b\rEnter\r")
    assert terminal.said() == "Alt\nEnter"
    terminal.type_at_prompt("Esc\x1b")
    time.sleep(PAUSE_S)
    terminal.type("\r Enter\r")
    assert terminal.said() == "Esc\n Enter"


def test_all_editors_have_the_same_history(start, history):
    """A message of several lines is one entry; a file that readline has written can be read."""
    history.parent.mkdir()
    history.write_text("from readline\n", newline="")
    for editor, keys, message in (
        ("prompt_toolkit", "\x10", "from readline"),
        ("readline", "one\x1b\rtwo", "one\ntwo"),
        ("prompt_toolkit", "\x10\x01\x10\x10", "from readline"),
        ("prompt_toolkit", "\x12tw\r", "one\ntwo"),
        ("readline", "\x10", "one\ntwo"),
    ):
        terminal = start(editor)
        terminal.type_at_prompt(f"{keys}\r")
        assert terminal.said() == message, (editor, keys)
        terminal.leave()
    assert history.read_bytes() == b"from readline\none\rtwo\nfrom readline\none\rtwo\n"
