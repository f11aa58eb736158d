"""Commands that tests start in a terminal, which is a pseudoterminal."""

import os
import select
import termios
import time

from running import START_S, Running


class Terminal(Running):
    """A command in its own terminal, which also shows its stderr."""

    def __init__(self, command, folder, stdout=None, **variables):
        self.ours, self.theirs = os.openpty()
        settings = termios.tcgetattr(self.theirs)
        settings[3] |= termios.NOFLSH  # otherwise Ctrl-C drops output that is not yet shown
        termios.tcsetattr(self.theirs, termios.TCSANOW, settings)
        self.seen = ""
        name = os.ttyname(self.theirs)
        shell = ["sh", "-c", 'out=$1; shift; exec "$@" <"$0" >"$out" 2>"$0"', name, stdout or name]
        environment = {"TERM": "dumb", "INPUTRC": os.devnull, "XDG_CACHE_HOME": str(folder), **variables}
        super().__init__([*shell, *command], **environment)

    def type(self, keys):
        os.write(self.ours, keys.encode())

    def until(self, text):
        """Wait for `text`, and return what has appeared before it."""
        deadline = time.monotonic() + START_S / 4
        while text not in self.seen:
            ready = select.select([self.ours], [], [], max(0, deadline - time.monotonic()))[0]
            assert ready, f"no {text!r} in {self.seen[-1000:]!r}"
            self.seen += os.read(self.ours, 1 << 16).decode()
        before, _, self.seen = self.seen.partition(text)
        return before.replace("\r\n", "\n")

    def prompt(self):
        """Return what has appeared before the prompt, when it is ready for keys."""
        before = self.until(">")
        time.sleep(0.1)  # a signal before readline waits would be seen only after it
        return before

    def echoes(self):
        """Return whether the terminal shows typed lines, as it does while no editor uses it."""
        flags = termios.ECHO | termios.ICANON
        return termios.tcgetattr(self.theirs)[3] & flags == flags

    def close(self):
        """End the command, if it has not ended."""
        self.kill_all()
        os.close(self.ours)
        os.close(self.theirs)
