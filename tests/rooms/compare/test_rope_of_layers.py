"""Tests of the causes that `minitp compare` names in models whose layers differ in their RoPE."""

import numpy as np
import pytest
from dump_files import write
from paths import GOLDENS
from safetensors.numpy import load_file

from minitp.compare.run import compare_files
from minitp.loading.source import open_model
from minitp.oracle import ops as oracle_ops
from minitp.trace.reference import open_oracle


@pytest.mark.parametrize(
    ("model", "layer", "rotated_as", "cause"),
    [
        ("gemma3", 1, 0, "B is rotated with the RoPE of layer 0, not of layer 1"),
        ("gemma3", 2, 1, "B is rotated with the RoPE of layer 1, not of layer 2"),
        ("gemma3", 1, None, "B is not rotated (RoPE)"),
        ("smollm3", 1, 0, "B is rotated (RoPE) in a layer without RoPE"),
    ],
)
def test_the_rope_of_another_layer(traces, tmp_path, model, layer, rotated_as, cause):
    a = traces("--oracle", model=str(GOLDENS / model))
    steps, rotations = load_file(a), open_oracle(open_model(str(GOLDENS / model), 1)).rotations
    name = f"prefill/layers.{layer}.attn.k"
    plain = steps.get(f"{name}_norm", steps[name])  # [K, T, d]
    positions = np.arange(plain.shape[1])
    found = plain if rotated_as is None else oracle_ops.rope(plain, positions, *rotations[rotated_as])
    step = compare_files(a, write(tmp_path / "b.npz", {f"{name}_rope": found})).steps[0]
    assert step.note == cause
