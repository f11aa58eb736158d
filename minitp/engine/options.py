"""The options of the ranks that `LLM`, `minitp chat` and `minitp serve` start."""

import operator
from dataclasses import dataclass, fields

from minitp.errors import InputError
from minitp.util.suggest import refuse_unknown

CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "float16", "bfloat16"),
    "kv_dtype": ("auto", "float16", "int8"),
    "comm": ("auto", "nccl", "peer", "mpi", "shm"),
}


@dataclass(frozen=True)
class EngineOptions:
    """Which model, on which ranks, and how much of it at once. The command's options have the same names.

    Attributes
    ----------
    model : str
        A directory, a .gguf file, a Hugging Face id, "smollm2", or "random:NAME".
    tp : str
        Ranks: a number, or "auto".
    layers : int or None
        Only the first so many.
    device, dtype, kv_dtype, comm : str
        One of CHOICES.
    share_gpu : bool
        Several ranks may use one GPU.
    max_context : int or None
        Positions of a sequence; None: as many as the model can.
    cache_tokens : int or None
        Positions that all requests may take together; None: what fits.
    block_size : int
        Positions of a block of the cache.
    max_tokens_per_step : int
        Of all requests together.
    max_sequences : int
        That run at the same time.
    verbose : bool
        Show in the end what the ranks have written.
    """

    model: str = "smollm2"
    tp: str = "auto"
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
        """Refuse values that no model could make right; NumPy's numbers and numbers as text become int."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if field.name in CHOICES:
                value = one_of(CHOICES[field.name], field.name, value)
            elif field.type is bool:
                value = flag(field.name, value)
            elif field.type in (int, int | None):
                value = whole_number(field.name, value)
            object.__setattr__(self, field.name, value)
        for name in ("block_size", "max_tokens_per_step", "max_sequences"):
            if getattr(self, name) < 1:
                raise InputError(f"{option(name)} {getattr(self, name)}: expected at least 1")
        if self.cache_tokens is not None and self.cache_tokens < self.block_size:
            raise InputError(
                f"--cache-tokens {self.cache_tokens}: expected at least a block, {self.block_size}"
            )


def options_from(owner, given):
    """Return EngineOptions from the parameters of `owner` by name; None means the default.

    Raises
    ------
    InputError
        if there is no such parameter, or it cannot have that value.
    """
    refuse_unknown(owner, given, [field.name for field in fields(EngineOptions)])
    as_text = ("model", "tp")  # may also be a Path and an int
    given = {name: value for name, value in given.items() if value is not None}
    return EngineOptions(**{name: str(value) if name in as_text else value for name, value in given.items()})


def one_of(choices, name, value):
    """A value that is one of some texts, or reads like it, as NumPy's dtypes do."""
    if str(value) not in choices:
        raise InputError(f"{option(name)} {value!r}: expected one of {', '.join(choices)}")
    return str(value)


def flag(name, value):
    """True or False, Python's or NumPy's."""
    if type(value).__name__ != "bool":
        raise InputError(f"{option(name)} {value!r}: expected True or False")
    return bool(value)


def whole_number(name, value):
    """An integer, Python's or NumPy's, or written as text."""
    try:
        if type(value).__name__ == "bool":
            raise TypeError
        return int(value) if isinstance(value, str) else operator.index(value)
    except (TypeError, ValueError):
        raise InputError(f"{option(name)} {value!r}: expected a whole number") from None


def option(name):
    """The command's option of a field's name."""
    return "--" + name.replace("_", "-")
