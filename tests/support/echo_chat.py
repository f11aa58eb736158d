"""A chat in a terminal without a model: it prints each message to stderr, as JSON after "SAID".

The arguments name modules that are treated as not installed. The answer to "wait" lasts until Ctrl-C, and the
answer to "slow" takes a moment.
"""

import json
import queue
import sys
import time
from types import SimpleNamespace

sys.modules.update(dict.fromkeys(sys.argv[1:]))  # before they are imported

from minitp.cli.terminal import at_terminal  # noqa: E402


class EchoConversation:
    """The part of Conversation that `at_terminal` uses."""

    llm = SimpleNamespace(
        source=SimpleNamespace(name="echo"), description={"tp": 1, "dtype": "float32", "context": 9}
    )

    def __init__(self):
        self._stop = queue.SimpleQueue()  # a signal handler may use it

    def say(self, text):
        print("SAID" + json.dumps(text), file=sys.stderr, flush=True)
        if text == "wait":
            self._stop.get()
            print("STOPPED", file=sys.stderr, flush=True)
        elif text == "slow":
            time.sleep(0.3)
        return True

    def reset(self):
        pass

    def interrupt(self):
        self._stop.put(None)


sys.stdin.reconfigure(errors="replace")
at_terminal(EchoConversation())
