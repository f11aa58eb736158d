"""Functions that format numbers and tables as text."""


def counted(number, noun):
    """Return a count with its noun: `1 rank`, `2 ranks`, `2 processes`."""
    if number == 1:
        return f"{number} {noun}"
    return f"{number} {noun}{'es' if noun.endswith(('s', 'ch')) else 's'}"


def duration(seconds):
    """Return a rough duration as text.

    >>> duration(1.4), duration(89), duration(200)
    ('1 second', '89 seconds', '3 minutes')
    """
    return counted(round(seconds), "second") if seconds < 90 else counted(round(seconds / 60), "minute")


def size(nbytes):
    """Return a number of bytes as text.

    >>> size(512), size(1152), size(56623104), size(14483464192)
    ('512 B', '1.2 kB', '56.6 MB', '14.48 GB')
    """
    if nbytes >= 1e9:
        return f"{nbytes / 1e9:.2f} GB"
    if nbytes >= 1e6:
        return f"{nbytes / 1e6:.1f} MB"
    return f"{nbytes / 1e3:.1f} kB" if nbytes >= 1e3 else f"{nbytes} B"


def aligned(rows, sides):
    """Return rows, tuples of str, as lines with aligned columns; `sides` has < or > for each column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
    return lines
