"""The errors that a user sees, each with a message and an exit code."""

import copyreg
import re

LONGEST = 290  # characters of an InputError, so that with "minitp: " its line stays below 300
LONGEST_VALUE = 60  # characters of a value in it, and of a path in a long one
PATH = re.compile(r"""[^\s,;:"'()]*/[^\s,;:"'()]+""")


class MinitpError(Exception):
    """An error that ends the command with one line on stderr and with `exit_code`."""

    exit_code = 3

    def __reduce__(self):
        """Return a recipe for pickle that does not call __init__, whose parameters may differ from `args`."""
        return copyreg.__newobj__, (type(self), *self.args), vars(self)


class InputError(MinitpError):
    """An error in the usage or the input that the user can correct; exit code 2.

    The message is one line of at most LONGEST printable characters. In a longer one, the middle of long paths
    is left out, and then its own middle, where values and lists of names are: it begins with what is wrong
    and ends with what to do. Other characters, which names in a model's files may have, are escaped: they
    could control a terminal.
    """

    exit_code = 2

    def __init__(self, message):
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.splitlines()))
        if len(line) > LONGEST:
            line = PATH.sub(lambda path: shortened(path[0], LONGEST_VALUE, ".."), line)
        super().__init__(shortened(line, LONGEST))


class ParameterError(InputError):
    """An invalid value of a parameter; exit code 2.

    A caller that knows the parameter under another name, such as a command-line option, can rephrase the
    message from the attributes.

    Attributes
    ----------
    name : str
        The name of the parameter.
    value : object
        The invalid value.
    expected : str
        A description of the valid values.
    """

    def __init__(self, name, value, expected):
        super().__init__(f"{name} {shown(value)}: expected {expected}")
        self.name, self.value, self.expected = name, value, expected


class ContextError(InputError):
    """A prompt that leaves no room in the context for a new token; exit code 2.

    Attributes
    ----------
    tokens : int or None
        The number of tokens in the prompt; None if it is too long to be tokenized.
    """

    def __init__(self, message, tokens=None):
        super().__init__(message)
        self.tokens = tokens


class RankError(MinitpError):
    """A failure of a rank, MPI or the device; exit code 3.

    The text of the error is the message, followed by the last lines of the rank's output, indented.

    Attributes
    ----------
    message : str
    last_words : list of str
        The last lines of the failed rank's output.
    """

    exit_code = 3

    def __init__(self, message, last_words=()):
        super().__init__("\n  ".join([message, *last_words]))
        self.message, self.last_words = message, list(last_words)


class AgreedError(MinitpError):
    """An error that `Comm.agree` raises on all ranks, so that they exit together.

    Any other exception that a rank does not catch might leave its peers waiting in a collective, so it aborts
    the whole job.
    """

    def __init__(self, message, exit_code):
        super().__init__(message)
        self.exit_code = exit_code


def shown(value):
    """Return the repr of a value for a message; only its beginning and end if it is long.

    >>> shown(0.5), shown([0] * 1000)
    ('0.5', '[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,  .. , 0, 0, 0, 0, 0, 0, 0]')
    """
    try:
        return shortened(repr(value), LONGEST_VALUE)
    except ValueError:  # Python refuses to print integers of thousands of digits
        return "a number of thousands of digits"


def shortened(text, most, gap=" .. "):
    """Return a text of at most `most` characters: the middle of a longer one is left out.

    >>> shortened("0123456789" * 3, 20)
    '0123456789 .. 456789'
    """
    if len(text) <= most:
        return text
    tail = (most - len(gap)) * 2 // 5
    return f"{text[: most - len(gap) - tail]}{gap}{text[-tail:]}"


def one_line(error):
    """Return an error as one line of text, with its type unless it is a MinitpError."""
    text = " ".join(str(error).split())
    if isinstance(error, MinitpError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
