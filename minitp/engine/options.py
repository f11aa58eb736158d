"""The options of the ranks that `LLM`, `minitp chat` and `minitp serve` start."""

import operator
from dataclasses import dataclass, fields

from minitp.errors import InputError, shown
from minitp.util.shares import split_text
from minitp.util.suggest import reject_unknown

CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "float16", "bfloat16"),
    "kv_dtype": ("auto", "float16", "int8"),
    "comm": ("auto", "nccl", "peer", "mpi", "shm"),
}


@dataclass(frozen=True)
class EngineOptions:
    """The options of an engine: model, ranks and limits. The command-line options have the same names.

    Attributes
    ----------
    model : str
        A directory, a .gguf file, a Hugging Face id, "smollm2", or "random:NAME".
    tp : str
        The number of ranks, or "auto".
    split : str or None
        The ranks' shares of the model, as in "3,1"; "auto" or "memory"; None for even shares.
    revision : str or None
        A branch, tag or commit of a Hugging Face id; None means its main branch.
    replicas : int
        The number of copies of the model, each on `tp` ranks of its own; requests are divided among them.
    layers : int or None
        The number of layers to load, from the first; None loads all.
    device, dtype, kv_dtype, comm : str
        A value from CHOICES.
    share_gpu : bool
        Let several ranks use one GPU.
    max_context : int or None
        The maximum number of positions of a sequence; None means the limit of the model.
    cache_tokens : int or None
        The number of positions in the KV cache for all requests together; None means as many as fit.
    block_size : int
        The number of positions in a block of the KV cache.
    max_tokens_per_step : int
        The maximum number of tokens in one batch.
    max_sequences : int
        The maximum number of sequences that run at the same time.
    verbose : bool
        Show Python tracebacks, and what every rank wrote to stderr.
    """

    model: str = "smollm2"
    tp: str = "auto"
    split: str | None = None
    revision: str | None = None
    replicas: int = 1
    layers: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    kv_dtype: str = "auto"
    comm: str = "auto"
    share_gpu: bool = False
    max_context: int | None = None
    cache_tokens: int | None = None
    block_size: int = 16
    max_tokens_per_step: int = 512
    max_sequences: int = 64
    verbose: bool = False

    def __post_init__(self):
        """Reject values that are invalid for every model; convert integers given as NumPy numbers or text."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if field.name == "split":
                value = split_text(value)
            elif field.name in CHOICES:
                value = one_of(CHOICES[field.name], field.name, value)
            elif field.type is bool:
                value = flag(field.name, value)
            elif field.type in (int, int | None):
                value = whole_number(field.name, value)
            object.__setattr__(self, field.name, value)
        for name in ("replicas", "block_size", "max_tokens_per_step", "max_sequences"):
            if getattr(self, name) < 1:
                raise InputError(f"{option(name)} {getattr(self, name)}: expected at least 1")
        if self.cache_tokens is not None and self.cache_tokens < self.block_size:
            raise InputError(
                f"--cache-tokens {self.cache_tokens}: expected at least {self.block_size}, one block"
            )


def options_from(given):
    """Return EngineOptions from a dict of the parameters of `LLM`; None means the default.

    Raises
    ------
    InputError
        If a parameter does not exist, or has an invalid value.
    """
    reject_unknown("LLM", given, [field.name for field in fields(EngineOptions)])
    as_text = ("model", "revision", "tp")  # the caller may pass a Path and an int
    given = {name: value for name, value in given.items() if value is not None}
    return EngineOptions(**{name: str(value) if name in as_text else value for name, value in given.items()})


def one_of(choices, name, value):
    """Return str(value), which must be one of `choices`; this accepts a NumPy dtype, too."""
    if str(value) not in choices:
        raise InputError(f"{option(name)} {shown(value)}: expected one of {', '.join(choices)}")
    return str(value)


def flag(name, value):
    """Convert a Python or NumPy bool to a Python bool; reject anything else."""
    if type(value).__name__ != "bool":
        raise InputError(f"{option(name)} {shown(value)}: expected True or False")
    return bool(value)


def whole_number(name, value):
    """Convert a Python or NumPy integer, or a string of digits, to an int; reject anything else."""
    try:
        if type(value).__name__ == "bool":
            raise TypeError
        return int(value) if isinstance(value, str) else operator.index(value)
    except (TypeError, ValueError):
        raise InputError(f"{option(name)} {shown(value)}: expected a whole number") from None


def option(name):
    """Return the command-line option for a field's name."""
    return "--" + name.replace("_", "-")
