"""The end of a command by SIGTERM or Ctrl-C; further ones are ignored while it ends."""

import signal
from contextlib import contextmanager

SIGNALS = signal.SIGINT, signal.SIGTERM


class Terminated(BaseException):
    """The exception that SIGTERM raises within `ended_by_signals`."""


@contextmanager
def ended_by_signals():
    """Let the first SIGTERM raise Terminated within the block, or the first Ctrl-C KeyboardInterrupt.

    Further signals are ignored until the process has ended, so that the ranks are ended in order, without a
    traceback, and the exit code is that of the first signal, or of either if both come at once. If Ctrl-C is
    ignored already, as for background jobs of a script, it stays so.
    """

    def end(number, frame):
        for each in SIGNALS:  # not SIG_IGN: Python reports a signal that has come before and finds no handler
            signal.signal(each, lambda number, frame: None)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    before = {number: signal.getsignal(number) for number in SIGNALS}
    if before[signal.SIGINT] is signal.SIG_IGN:
        del before[signal.SIGINT]
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is end:
            for number, handler in before.items():
                signal.signal(number, handler)
        else:  # Python's exit would restore the default handlers, which end the process
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
