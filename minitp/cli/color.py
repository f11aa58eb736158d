"""Colors of text on a terminal, which NO_COLOR turns off (https://no-color.org)."""

import os

DIM, RED, GREEN, RESET = "\x1b[2m", "\x1b[31m", "\x1b[32m", "\x1b[0m"


def dimmed(text, stream):
    """Return the text, dimmed if `stream` is a terminal."""
    return _colored(text, DIM, stream)


def judged(text, is_good, stream):
    """Return a verdict, in green or red if `stream` is a terminal."""
    return _colored(text, GREEN if is_good else RED, stream)


def _colored(text, color, stream):
    plain = not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"{color}{text}{RESET}"
