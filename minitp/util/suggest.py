"""Suggestions for names that a user has mistyped, or knows from another tool."""

import functools
from dataclasses import fields
from difflib import get_close_matches

from minitp.errors import InputError

# Names in vLLM, llama.cpp, Transformers and the OpenAI API -> minitp's name; None: minitp has no such option.
ALIASES = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "n_predict": "max_new_tokens",
    "num_predict": "max_new_tokens",
    "temp": "temperature",
    "tensor_parallel": "tp",
    "tensor_parallel_size": "tp",
    "tp_size": "tp",
    "num_gpus": "tp",
    "tensor_split": "split",
    "rank_tp_ratio": "split",
    "max_model_len": "max_context",
    "ctx_size": "max_context",
    "n_ctx": "max_context",
    "context_length": "max_context",
    "max_num_seqs": "max_sequences",
    "max_num_batched_tokens": "max_tokens_per_step",
    "kv_cache_dtype": "kv_dtype",
    "cache_dtype": "kv_dtype",
    "model_path": "model",
    "model_name_or_path": "model",
    "torch_dtype": "dtype",
    "precision": "dtype",
    "backend": "comm",
    "num_layers": "layers",
    "random_seed": "seed",
    "stop_sequences": "stop",
    "stop_strings": "stop",
    "eos": "ignore_eos",
    "no_cache": "no_kv_cache",
    "gpu_memory_utilization": None,
    "n_gpu_layers": None,
    "pipeline_parallel_size": None,
    "quantization": None,
    "run": "generate",
    "complete": "generate",
    "server": "serve",
    "benchmark": "bench",
    "diff": "compare",
    "verify": "check",
    "dump": "trace",
    "convert": "shard",
    "version": "info",
    "ppl": "perplexity",
}
CUTOFF = 0.72  # similarity from 0 to 1; a lower cutoff would suggest unrelated names


def did_you_mean(word, candidates, aliases=ALIASES):
    """Return the candidate that `word` most likely stands for, or None.

    Dashes and underscores are equivalent, so `--max-tokens` and `max_tokens` find the same name.

    Parameters
    ----------
    word : str
        The unknown name.
    candidates : iterable of str
        The valid names, spelled as the user may write them.
    aliases : dict
        Other tools' names -> minitp's name, or None if minitp has no such option; with underscores.

    >>> did_you_mean("--temprature", ["--temperature", "--top-p"])
    '--temperature'
    >>> did_you_mean("max_tokens", ["max_new_tokens", "max_context"])
    'max_new_tokens'
    """
    plain = _plain(word)
    known = {_plain(candidate): candidate for candidate in candidates}
    if plain in known:
        return known[plain]
    if plain in aliases and aliases[plain] is None:
        return None
    if aliases.get(plain) in known:
        return known[aliases[plain]]
    longer = [name for name in known if len(plain) > 1 and name.startswith(plain)]
    close = longer if len(longer) == 1 else get_close_matches(plain, known, n=1, cutoff=CUTOFF)
    return known[close[0]] if close else None


def reject_unknown(owner, given, known):
    """Raise InputError if `given` has a name that is not in `known`, and suggest the likely one."""
    for name in given:
        if name not in known:
            likely = did_you_mean(name, known)
            hint = f"did you mean {likely}?" if likely else f"its parameters are {', '.join(known)}"
            raise InputError(f"{owner} has no parameter {name}; {hint}")


def suggests_fields(cls):
    """Make a dataclass reject unknown keyword arguments as `reject_unknown` does; a class decorator."""
    generated, known = cls.__init__, [field.name for field in fields(cls)]

    @functools.wraps(generated)
    def init(self, /, *args, **given):
        reject_unknown(cls.__name__, given, known)
        generated(self, *args, **given)

    cls.__init__ = init
    return cls


def _plain(name):
    return name.lstrip("-").replace("-", "_").lower()
