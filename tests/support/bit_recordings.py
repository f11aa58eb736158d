"""The recordings whose bits the tests of `minitp bits` compare, and their copies with changes."""

import numpy as np
from paths import PROBED
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from minitp.bits.run import bits_of_files

PROMPT = [3, 50, 7, 7, 91]
RECORDED = PROBED / "llama2.safetensors"


def read(path):
    """Return the arrays and the metadata of a safetensors file."""
    with safe_open(path, framework="np") as file:
        return load_file(path), file.metadata()


def changed_copy(folder, change, name="b.safetensors"):
    """Write a copy of the recording, changed by change(arrays, metadata), and return its path."""
    arrays, metadata = read(RECORDED)
    change(arrays, metadata)
    save_file(arrays, folder / name, metadata)
    return folder / name


def row_of(*paths):
    """Return the Row of the second recording, compared with the first."""
    (row,) = bits_of_files(list(map(str, paths)))
    return row


def next_number(array, index):
    """Replace an element by the next larger number."""
    array[index] = np.nextafter(array[index], array.dtype.type(np.inf))


def module_outputs(pass_name="prefill"):
    """Return the recorded steps as the outputs of a model's modules: [1, T, D], by the modules' paths."""
    arrays, found = read(RECORDED)[0], {}
    for layer in range(2):
        path = f"model.layers.{layer}"
        for part, module in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj")):
            heads = arrays[f"{pass_name}/layers.{layer}.attn.{part}"]  # [n, T, d]
            found[f"{path}.self_attn.{module}"] = heads.transpose(1, 0, 2).reshape(1, heads.shape[1], -1)
        for step, module in (
            ("attn.norm", "input_layernorm"),
            ("attn.out", "self_attn.o_proj"),
            ("mlp.norm", "post_attention_layernorm"),
            ("mlp.gate", "mlp.gate_proj"),
            ("mlp.up", "mlp.up_proj"),
            ("mlp.out", "mlp.down_proj"),
        ):
            found[f"{path}.{module}"] = arrays[f"{pass_name}/layers.{layer}.{step}"][None]
        found[path] = arrays[f"{pass_name}/layers.{layer}.mlp.residual"][None]
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def in_batch(outputs, index=2):
    """Return the outputs in a batch of four sequences, of which the others are different."""
    rng, found = np.random.default_rng(0), {}
    for name, array in outputs.items():
        found[name] = rng.standard_normal((4, *array.shape[1:]), dtype=np.float32)
        found[name][index] = array[0]
    return found
