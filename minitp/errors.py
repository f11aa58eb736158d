"""The errors a user sees: one line each, and the exit code that goes with them."""


class MinitpError(Exception):
    """Something that ends the command with one line on stderr and `exit_code`."""

    exit_code = 3


class InputError(MinitpError):
    """Bad usage or bad input: the user can mend it. Exit code 2."""

    exit_code = 2


class ParameterError(InputError):
    """A value that a parameter cannot have; whoever knows how the user spells the parameter may say so.

    Attributes
    ----------
    name, value, expected
    """

    def __init__(self, name, value, expected):
        super().__init__(f"{name} {value!r}: expected {expected}")
        self.name, self.value, self.expected = name, value, expected


class ContextError(InputError):
    """A prompt leaves the context no room."""


class RankError(MinitpError):
    """A rank, MPI or the device failed. Exit code 3.

    Its text is the message, and on lines of their own, indented, the last that the rank has written.

    Attributes
    ----------
    message : str
    last_words : list of str
    """

    exit_code = 3

    def __init__(self, message, last_words=()):
        super().__init__("\n  ".join([message, *last_words]))
        self.message, self.last_words = message, list(last_words)


class AgreedError(MinitpError):
    """An error that every rank has learnt in `Comm.agree`, so that all may leave together.

    Any other exception that escapes a rank may leave its peers waiting in a collective: it aborts the job.
    """

    def __init__(self, message, exit_code):
        super().__init__(message)
        self.exit_code = exit_code


def one_line(error):
    """The error as one line of text, with its type unless it is one of ours."""
    text = " ".join(str(error).split())
    if isinstance(error, MinitpError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
