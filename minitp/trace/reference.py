"""The oracle's run of a model, divided into the passes and steps of a trace."""

from minitp.oracle import Oracle
from minitp.trace.names import AFTER, BEFORE, LAYER, full_name, split_name


def open_oracle(source):
    """Return the Oracle of a ModelSource; it reads config.json and the weights with its own code."""
    if source.directory is not None:
        return Oracle.from_directory(source.directory, source.plan.layers)
    if source.gguf is not None:
        from minitp.oracle.gguf import gguf_tensor

        return Oracle(source.fields(), gguf_tensor(source.gguf.file.path), source.plan.layers)

    def tensor(name, index=None):
        return source.tensors.read(name, index or tuple(slice(0, n) for n in source.tensors.shapes[name]))

    return Oracle(source.fields(), tensor, source.plan.layers)


def oracle_steps(oracle, token_ids, passes):
    """Yield (full name, float64 array) of the steps of all passes, from one oracle run over all tokens.

    All passes of a layer come before the next layer.
    """
    for name, whole in oracle.steps(token_ids):
        for pass_name, start, stop in passes:
            for layer, step, index in pass_steps(oracle, name, start, stop):
                yield full_name(pass_name, layer, step), whole[index]


def pass_steps(oracle, name, start, stop):
    """Yield (layer, step, index) of the steps of a pass that are parts of the oracle's step `name`.

    The pass has the tokens at positions start .. stop - 1, and `index` selects its part of the oracle's array
    of all tokens. Keys and values give a step of the cache, too.
    """
    _, layer, step = split_name(name)
    window = None if layer is None else oracle.windows[layer]
    first = 0 if window is None else max(0, start - window + 1)
    cuts = {"T": slice(start, stop), "S": slice(first, stop)}
    cached = {"attn.k_rope": "attn.k_cache", "attn.v": "attn.v_cache"}.get(step)
    for step_of_pass in filter(None, (step, cached)):
        letters = (BEFORE | LAYER | AFTER)[step_of_pass].split()
        yield layer, step_of_pass, tuple(cuts.get(letter, slice(None)) for letter in letters)
