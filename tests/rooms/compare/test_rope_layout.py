"""`minitp compare --rope`: heads in the interleaved RoPE layout are converted before they are compared."""

import numpy as np
import pytest
from dump_files import TRACE, command, rng
from safetensors.numpy import load_file, save_file

from minitp.compare.run import compare_files

PROJECTIONS = (
    "q_proj.weight",
    "k_proj.weight",
    "q_proj.bias",
    "k_proj.bias",
    "q_norm.weight",
    "k_norm.weight",
)
HEADS = tuple(f".attn.{part}{step}" for part in "qk" for step in ("", "_norm", "_rope"))


def interleaved(array, head_dim, rotary_dim):
    """Put the halves of each head's first rows, its dimensions, in turn: [n * d, ..] -> [n * d, ..]."""
    order = [*np.arange(rotary_dim).reshape(2, -1).T.flat, *range(rotary_dim, head_dim)]
    heads = array.reshape(-1, head_dim, *array.shape[1:])[:, order]
    return np.ascontiguousarray(heads).reshape(array.shape)


def other_layout(steps, head_dim=8, rotary_dim=8):
    """Return steps as an engine with interleaved heads has them."""
    found = dict(steps)
    for name, array in steps.items():
        if name.endswith(PROJECTIONS):
            found[name] = interleaved(array, head_dim, rotary_dim)
        elif name.endswith((*HEADS, "k_cache")):
            rows = interleaved(array.swapaxes(0, -1), head_dim, rotary_dim)
            found[name] = np.ascontiguousarray(rows.swapaxes(0, -1))
    return found


@pytest.mark.parametrize("model", ["model", "qwen3", "partial"])
def test_all_steps_and_weights_are_converted(traces, tmp_path, capsys, model):
    a = traces("--steps", "*", "--steps", "weights/*", "--decode", "1", model=model)
    steps = load_file(a)
    b = tmp_path / "b.safetensors"
    save_file(other_layout(steps, rotary_dim=6 if model == "partial" else 8), b)
    capsys.readouterr()
    result = compare_files(a, b, rope="interleaved")
    assert [(step.name, step.note) for step in result.departing] == []
    converted = {step.name for step in result.steps if step.layout == "B is interleaved"}
    changed = {name for name in steps if name.endswith((*PROJECTIONS, *HEADS, "k_cache"))}
    assert converted == changed
    assert len(changed) > 20
    code, out = command(capsys, a, b)
    assert code == 1
    first = "weights/model.layers.0.self_attn."
    assert out.splitlines()[-1].startswith(f"first differing step: {first}")
    assert out.splitlines()[-1].endswith("the other RoPE layout; --rope interleaved converts them)")
    code, out = command(capsys, a, b, "--rope", "half")
    assert code == 1
    assert "the other RoPE layout)" in out.splitlines()[-1], "the user has said that it is not meant"
    code, out = command(capsys, a, b, "--rope", "interleaved")
    assert code == 0
    assert f"{len(changed)} of them in another layout" in out.splitlines()[-1]


def test_half_is_the_default(traces, capsys):
    a = traces()
    capsys.readouterr()
    assert command(capsys, a, a, "--rope", "half") == command(capsys, a, a)


def test_half_split_heads_depart_if_interleaved_ones_are_announced(traces):
    a = traces()
    names = {step.name.rpartition(".")[2] for step in compare_files(a, a, rope="interleaved").departing}
    assert names == {"q", "k", "q_rope", "k_rope", "k_cache"}


def test_another_order_of_axes_and_a_part(two):
    name, a = TRACE.format(0, "attn.q"), rng().standard_normal((4, 6, 8))
    b = other_layout({name: a})[name].transpose(1, 0, 2).reshape(6, 32)
    step = two({name: a}, {name: b}, rope="interleaved").steps[0]
    assert (step.relative, step.note) == (0, "B is [T, H*d], interleaved")
    step = two({name: a}, {name: np.pad(b, [(0, 2), (0, 0)])}, rope="interleaved").steps[0]
    assert (step.relative, step.rest) == (0, "B has 8 positions and A 6; B's first 6 are compared")


def test_the_head_size_of_weights(two):
    """Check that it is known from any array of heads in A, and that weights are left out if it is not."""
    k, w = TRACE.format(0, "attn.k"), "weights/model.layers.0.self_attn.k_proj.weight"
    a = {w: rng().standard_normal((16, 32)), k: rng().standard_normal((2, 6, 8)), "x": np.ones(3)}
    result = two(a, other_layout(a), rope="interleaved")
    assert [step.relative for step in result.steps] == [0, 0, 0]
    del a[k]
    result = two(a, other_layout(a), rope="interleaved")
    assert [array.name for array in result.not_compared] == [w]
    assert result.not_compared[0].reason == "--rope needs the head size, which is in the traces of minitp"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_rotation_still_departs(traces, tmp_path, dtype):
    """Check that weights in Hugging Face's order with pairs rotated as in Meta's code are a mistake."""
    a = traces("--dtype", dtype)
    steps = load_file(a)
    b = tmp_path / "b.safetensors"
    heads = ("_rope", "k_cache")
    save_file(steps | {name: x for name, x in other_layout(steps).items() if name.endswith(heads)}, b)
    first = compare_files(a, b).departing[0]
    assert first.name == TRACE.format(0, "attn.q_rope")
    first = compare_files(a, b, rope="interleaved").departing[0]
    assert first.name == TRACE.format(0, "attn.q")


def test_the_jump_rule_uses_converted_heads(traces, tmp_path):
    a, b = traces("--oracle"), tmp_path / "b.safetensors"
    save_file(other_layout(load_file(traces("--dtype", "bfloat16"))), b)
    assert compare_files(a, b, rope="interleaved").departing == []
