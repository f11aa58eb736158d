"""Arrays that another program saved without metadata: their tokens, passes and dtype."""

import re
from collections import Counter

import numpy as np

from minitp.errors import InputError
from minitp.judge.sizes import elements
from minitp.trace.names import FLOAT32, full_name, split_name
from minitp.util.format import counted

WITH_ROWS = ("embed", "attn.norm", "attn.residual", "mlp.norm", "mlp.residual")
PASSES = re.compile(r"(prefill|decode)(?:\.(\d+))?")


def dtype_of_dump(files):
    """Return the name of the dtype that most arrays have."""
    dtypes = Counter(
        entry.dtype
        for name, entry in files.ranks[0].entries.items()
        if entry.dtype.startswith(("float", "bfloat")) and split_name(name)[2] not in FLOAT32
    )
    if not dtypes:
        raise InputError(f"{files.path}: it has no floating-point arrays under the names of docs/compare.md")
    return dtypes.most_common(1)[0][0]


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
