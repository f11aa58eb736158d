"""The steps among the arrays of a dump: by their own names, or by those of an engine's modules."""

import re
from types import SimpleNamespace

from minitp.compare.pairing import FIRST_PASS
from minitp.mapping.steps import StepLookup
from minitp.mapping.transformers import TRANSFORMERS
from minitp.trace.names import AFTER, BEFORE, LAYER, full_name, split_name

LETTERS = {step: letters.split() for step, letters in (BEFORE | LAYER | AFTER).items()}
RUN_INPUTS = {
    "tokens": r"input_ids|(.+\.)?(embed_tokens|word_embeddings|tok_embeddings)\.input(\.0)?",
    "positions": r"position_ids|cache_position",
}
BATCH = "1"  # the letter of the axis of sequences, which has one element in a recording of one sequence


def steps_of(shapes):
    """Return (full name of the step, letters of its axes) of each array that is a step, by name in the file.

    Parameters
    ----------
    shapes : dict of str to tuple of int
        The shapes of the arrays.

    >>> steps_of({"layers.0.attn.q": (4, 7, 8), "x": (3,)})
    {'layers.0.attn.q': ('prefill/layers.0.attn.q', ['H', 'T', 'd'])}
    >>> steps_of({"model.layers.1.mlp.gate_proj": (2, 7, 64)})
    {'model.layers.1.mlp.gate_proj': ('prefill/layers.1.mlp.gate', ['1', 'T', 'F'])}
    """
    found = {}
    for name, shape in shapes.items():
        letters = _fitting(LETTERS.get(split_name(name)[2], []), shape)
        if letters:
            found[name] = name if "/" in name else FIRST_PASS + name, letters
    others = {name: shape for name, shape in shapes.items() if name not in found}
    taken = {step for step, _ in found.values()}
    modules = (_steps_of_modules(others) | _inputs_of_runs(others)).items()
    return found | {name: each for name, each in modules if each[0] not in taken}


def _inputs_of_runs(shapes):
    """Return the tokens and positions among the arrays of modules."""
    found = {}
    for name, shape in shapes.items():
        pass_name, _, path = name.rpartition("/")
        step = next((step for step, pattern in RUN_INPUTS.items() if re.fullmatch(pattern, path)), None)
        if step and len(shape) in (1, 2):
            full = full_name(pass_name or FIRST_PASS[:-1], None, step)
            found.setdefault(full, (name, [BATCH, "T"][-len(shape) :]))
    return {name: (full, letters) for full, (name, letters) in found.items()}


def _steps_of_modules(shapes):
    """Return the steps among the arrays whose names are an engine's, of the model that has most of them."""
    best = {}
    for engine, model_type in [*(("hf", name) for name in TRANSFORMERS), ("megatron", "llama")]:
        config = SimpleNamespace(
            model_type=model_type, embedding_multiplier=1, logits_scaling=1, final_logit_softcapping=None
        )
        lookup, found = StepLookup(engine, config), {}
        for name, shape in shapes.items():
            pass_name, _, path = name.rpartition("/")
            layer, source = lookup.find(path) or (None, None)
            letters = source and _fitting(source.layout.split(), shape)
            if not letters:
                continue
            step = full_name(pass_name or FIRST_PASS[:-1], layer, source.step.split()[0])
            if step not in [taken for taken, _ in found.values()]:
                found[name] = step, letters
        best = max(best, found, key=len)
    return best


def _fitting(letters, shape):
    """Return the letters of an array's axes, with or without that of sequences; None if neither fits."""
    flat = [letter for letter in letters if letter != BATCH]
    return next((each for each in (letters, flat, [BATCH, *flat]) if len(each) == len(shape)), None)
