"""The colors of text on a terminal; https://no-color.org says how a user turns them off."""

import os

DIM, RED, GREEN, RESET = "\x1b[2m", "\x1b[31m", "\x1b[32m", "\x1b[0m"


def dimmed(text, stream):
    """Return the text as `stream` shows it dimmed."""
    return _colored(text, DIM, stream)


def judged(text, is_good, stream):
    """Return a verdict as `stream` shows it in green or red."""
    return _colored(text, GREEN if is_good else RED, stream)


def _colored(text, color, stream):
    plain = not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"{color}{text}{RESET}"
