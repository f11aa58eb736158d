"""The recipes of the probe: the arrays of an engine that are steps, with their layouts.

A recipe maps a module's path, in which {i} stands for the number of a layer, to a list of Source. Shape
letters are those of `trace.names`; "1" is the batch of one sequence, and a name such as Hd is the product of
two sizes. `to_step` converts an array from an engine's layout to that of the step.
"""

from dataclasses import dataclass

import numpy as np

from minitp.trace.names import AFTER, BEFORE, LAYER

IN, OUT = "input", "output"


@dataclass(frozen=True)
class Source:
    """An input or output of a module that is a step.

    Attributes
    ----------
    step : str
        The step, or several that are joined along the last axis, as in "attn.q attn.k attn.v".
    where : str
        IN or OUT. Of several inputs or outputs it is the first.
    layout : str
        The letters of the engine's axes.
    """

    step: str
    where: str
    layout: str


def out(step, layout="1 T D"):
    return Source(step, OUT, layout)


def into(step, layout="1 T D"):
    return Source(step, IN, layout)


LAYERS = "model.layers.{i}"
ATTENTION, MLP = f"{LAYERS}.self_attn", f"{LAYERS}.mlp"
# Hugging Face transformers, by model_type. Rotated queries and keys, the cache and the probabilities are
# arguments and results of functions; see `record.ProbeRecorder.observed`.
LLAMA = {
    "model.layers.0": [into("embed")],
    f"{LAYERS}.input_layernorm": [out("attn.norm")],
    f"{ATTENTION}.q_proj": [out("attn.q", "1 T Hd")],
    f"{ATTENTION}.k_proj": [out("attn.k", "1 T Kd")],
    f"{ATTENTION}.v_proj": [out("attn.v", "1 T Kd")],
    f"{ATTENTION}.o_proj": [into("attn.context", "1 T Hd"), out("attn.out")],
    f"{LAYERS}.post_attention_layernorm": [into("attn.residual"), out("mlp.norm")],
    f"{MLP}.gate_proj": [out("mlp.gate", "1 T F")],
    f"{MLP}.up_proj": [out("mlp.up", "1 T F")],
    f"{MLP}.down_proj": [into("mlp.act", "1 T F"), out("mlp.out")],
    LAYERS: [out("mlp.residual")],
    "model.norm": [out("final_norm")],
    "": [out("logits", "1 T V")],
}
HEAD_NORMS = {
    f"{ATTENTION}.q_norm": [out("attn.q_norm", "1 T H d")],
    f"{ATTENTION}.k_norm": [out("attn.k_norm", "1 T K d")],
}
TRANSPOSED_HEAD_NORMS = {  # Gemma 3 transposes before the norm
    f"{ATTENTION}.q_norm": [out("attn.q_norm", "1 H T d")],
    f"{ATTENTION}.k_norm": [out("attn.k_norm", "1 K T d")],
}
JOINED = {
    f"{ATTENTION}.qkv_proj": [out("attn.q attn.k attn.v", "1 T Hd")],
    f"{MLP}.gate_up_proj": [out("mlp.gate mlp.up", "1 T F")],
}
POST_NORMS = {
    f"{LAYERS}.post_attention_layernorm": [out("attn.post_norm")],
    f"{LAYERS}.pre_feedforward_layernorm": [into("attn.residual"), out("mlp.norm")],
    f"{LAYERS}.post_feedforward_layernorm": [out("mlp.post_norm")],
}
EXPERTS = {f"{MLP}.gate": [out("mlp.router", "T E")], MLP: [out("mlp.out")]}
TRANSFORMERS = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "granite": LLAMA,
    "smollm3": LLAMA,
    "qwen3": LLAMA | HEAD_NORMS,
    "phi3": LLAMA | JOINED,
    "gemma2": LLAMA | POST_NORMS,
    "gemma3_text": LLAMA | POST_NORMS | TRANSPOSED_HEAD_NORMS,
    "mixtral": LLAMA | EXPERTS,
    "qwen3_moe": LLAMA | HEAD_NORMS | EXPERTS,
}


def letters_of(step):
    """Return the letters of a step's axes."""
    return (BEFORE | LAYER | AFTER)[step].split()


def to_step(step, array, layout, sizes):
    """Convert an array from an engine's layout to that of a step.

    Parameters
    ----------
    step : str
    array : array
    layout : str
        The letters of the array's axes.
    sizes : dict of str to int
        The size of each letter that is part of a joined axis.

    >>> to_step("attn.q", np.zeros((1, 5, 12)), "1 T Hd", {"H": 3, "d": 4}).shape
    (3, 5, 4)
    """
    axes, shape = [], []
    for name, size in zip(layout.split(), array.shape, strict=True):
        parts = list(name) if len(name) == 2 and letters_of(step) != layout.split()[1:] else [name]
        axes += parts
        shape += [sizes[part] for part in parts] if len(parts) > 1 else [size]
    array = array.reshape(shape)
    keep = [axis for axis, name in enumerate(axes) if name != "1"]
    array = array.reshape([shape[axis] for axis in keep])
    axes = [axes[axis] for axis in keep]
    return np.ascontiguousarray(array.transpose([axes.index(name) for name in letters_of(step)]))


def split_joined(steps, array, sizes):
    """Split an array along its last axis into those of the steps that it joins; yield (step, array)."""
    letters = {"attn.q": "H", "attn.k": "K", "attn.v": "K"}
    start = 0
    for step in steps:
        width = sizes[letters[step]] * sizes["d"] if step in letters else array.shape[-1] // len(steps)
        yield step, array[..., start : start + width]
        start += width
