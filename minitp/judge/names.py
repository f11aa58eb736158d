"""The names of a recording's arrays: those of a map, those that no step has, and those of an engine."""

import re

from minitp.compare.files import TensorFile
from minitp.compare.pairing import read_names
from minitp.errors import InputError, shown
from minitp.mapping.lookup import engine_of
from minitp.trace.names import AFTER, BEFORE, BLOCK_TABLE, LAYER, WEIGHTS, split_name
from minitp.util.suggest import did_you_mean

STEPS = BEFORE | LAYER | AFTER
SHOWN = 4  # number of names in a line
SIGNS = {  # parts of the names that these engines' arrays have
    "hf": r"\blayers\.\d+\.(self_attn|input_layernorm|post_attention_layernorm|mlp\.(gate|up|down)_proj)\b",
    "llama.cpp": r"^(Qcur|Kcur|Vcur|attn_norm|ffn_\w+|kqv_out|l_out)-\d+",
}


class RenamedFile(TensorFile):
    """A TensorFile whose arrays have the names of steps, according to a map; others keep their names.

    Parameters
    ----------
    file : TensorFile
    path : str
        A JSON object of names of steps to names in the file, as for `compare`. A `*` stands for the same
        number in both.

    Raises
    ------
    InputError
        If a name is not that of a step, or is not in the file.
    """

    def __init__(self, file, path):
        self._file, self._stored, mapped = file, {}, set()
        for ours, theirs in read_names(path):
            if not is_step(ours.replace("*", "0")):
                raise InputError(f"{path}: {ours!r} is not the name of a step, such as layers.*.attn.q_rope")
            pattern = re.compile(r"((?:rank\d+/)?)" + re.escape(theirs).replace(r"\*", r"(\d+)"))
            matches = [found for found in map(pattern.fullmatch, file.entries) if found]
            if not matches:
                some = ", ".join(map(repr, list(file.entries)[:2]))
                raise InputError(f"{path}: {theirs!r} is not in {file.path}, which has {some}, ..")
            for found in matches:
                rank, *numbers = found.groups()
                self._stored[rank + ours.replace("*", "{}").format(*numbers)] = found[0]
                mapped.add(found[0])
        self._stored |= {name: name for name in file.entries if name not in mapped}
        super().__init__(
            file.path, {name: file.entries[stored] for name, stored in self._stored.items()}, file.metadata
        )

    def read(self, name):
        """Return an array in float64, as TensorFile does."""
        return self._file.read(self._stored[name])


def is_step(name):
    """Return whether a name is that of a step, within a layer or not."""
    _, layer, step = split_name(name)
    return step in (BEFORE | AFTER if layer is None else LAYER)


def is_unknown(name):
    """Return whether an array is neither a step nor a weight."""
    return not (is_step(name) or name.startswith(WEIGHTS) or split_name(name)[2] == BLOCK_TABLE)


def unknown_text(names):
    """Return a line about arrays with unknown names, with the likely ones; "" if there are none."""
    patterns = list(dict.fromkeys(re.sub(r"\d+", "*", name) for name in names))
    listed = []
    for pattern in patterns[:SHOWN]:
        *_, step = re.split(r"\blayers?\.\*\.", pattern)
        likely = step if step in LAYER else did_you_mean(step, STEPS)
        likely = f"layers.*.{likely}" if likely in LAYER and "layers.*." not in f"/{pattern}" else likely
        listed.append(f"{pattern} ({likely}?)" if likely else pattern)
    if not listed:
        return ""
    more = ", .." if len(patterns) > SHOWN else ""
    which = "array with an unknown name" if len(names) == 1 else "arrays with unknown names"
    return f"not judged: {len(names)} {which}: {', '.join(listed)}{more}{map_hint(names)}"


def map_hint(names):
    """Return a hint at --map if some names look like those of an engine, else ""."""
    engine = engine_of(names)
    for sign, pattern in SIGNS.items():
        if engine == "hf" and any(re.search(pattern, name) for name in names):
            return f"; if these are the engine's own names, add --map {sign}"
    return "" if engine == "hf" else f"; if these are the engine's own names, add --map {engine}"


def no_steps(path, names):
    """Return the error for a file without any step."""
    hint = map_hint(names) or "; rename them, or pair the names with --map NAMES.json"
    name = next(filter(is_unknown, names), names[0])
    return InputError(
        f"{path}: it has no arrays with names such as prefill/layers.0.attn.q_rope, but {shown(name)}{hint}"
    )
