"""Arrays that another program saved without metadata: their tokens, passes and dtype."""

import re
from collections import Counter

import numpy as np

from minitp.errors import InputError
from minitp.judge.sizes import elements
from minitp.trace.names import FLOAT32, full_name, split_name
from minitp.util.format import counted

FLOATS = ("float32", "float16", "bfloat16", "float64")
WITH_ROWS = ("embed", "attn.norm", "attn.residual", "mlp.norm", "mlp.residual")
PASSES = re.compile(r"(prefill|decode)(?:\.(\d+))?")


def dtype_of_dump(files):
    """Return the name of the dtype that most arrays of the first layer have, to judge by their numbers."""
    rank = files.ranks[0]
    names = [
        name
        for name, entry in rank.entries.items()
        if entry.dtype in FLOATS and split_name(name)[1] in (None, 0) and split_name(name)[2] not in FLOAT32
    ]
    if not names:
        raise InputError(f"{files.path}: the arrays of layer 0 are not {', '.join(FLOATS)}")
    dtypes = Counter(smallest_dtype(rank.read(name), rank.entries[name].dtype) for name in names)
    return dtypes.most_common(1)[0][0]


def smallest_dtype(array, dtype):
    """Return the name of a 16-bit dtype that has all numbers of an array, or else its own `dtype`.

    A program in Python often saves bfloat16 as float32, because NumPy itself has no bfloat16.
    """
    return next((name for name in ("bfloat16", "float16") if is_exact_in(array, name)), dtype)


def is_exact_in(array, dtype):
    """Return whether a dtype has all numbers of an array."""
    with np.errstate(over="ignore"):
        return np.array_equal(array.astype(dtype).astype(array.dtype), array, equal_nan=True)


def passes_of_dump(files, config, tokens=None):
    """Return the token ids and the (start, stop) of each pass by name.

    The number of tokens of a pass is that of its `tokens`, or of another array.
    """
    rank, spans, ids = files.ranks[0], {}, []
    names = {name.rpartition("/")[0] for name in rank.entries}
    for name in sorted(names, key=lambda name: order(files, name)):
        recorded = rank.entries.get(f"{name}/tokens")
        count = elements(recorded) if recorded else tokens_of_pass(rank, name, config)
        if not count and len(names) == 1 and tokens:
            count = len(tokens)
        if not count:
            raise InputError(f"{files.path}: it lacks {name}/tokens, the token ids of the pass")
        start = sum(stop - begin for begin, stop in spans.values())
        spans[name] = (start, start + count)
        if recorded:
            ids += rank.read(f"{name}/tokens").reshape(-1).astype(np.int64).tolist()
    count = sum(stop - start for start, stop in spans.values())
    ids = tokens or ids
    if not ids:
        raise InputError(
            f"{files.path}: it lacks prefill/tokens, the {counted(count, 'token id')} of its passes; save "
            "them, or give them with --tokens 1,2,3"
        )
    if len(ids) != count:
        what = f"--tokens has {len(tokens)}" if tokens else f"its arrays named tokens have {len(ids)}"
        raise InputError(
            f"{files.path}: its passes have {counted(count, 'token')}, and {what}; give the ids of all "
            "passes with --tokens 1,2,3"
        )
    return ids, spans


def tokens_of_pass(rank, pass_name, config):
    """Return the number of rows of the first array [T, D] of a pass, or 0 if there is none."""
    for step in WITH_ROWS:
        entry = rank.entries.get(full_name(pass_name, None if step == "embed" else 0, step))
        if entry is not None:
            return elements(entry) // config.hidden_size
    return 0


def order(files, pass_name):
    """Return a sort key for the name of a pass; prompts come first, in chunks or not."""
    match = PASSES.fullmatch(pass_name)
    if match is None:
        raise InputError(
            f"{files.path}: the pass {pass_name!r}: expected prefill, prefill.1, .. or decode.1, .."
        )
    return match[1] == "decode", int(match[2] or 0)
