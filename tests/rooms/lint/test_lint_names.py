"""Names and shapes of tensors: what is compared, what is passed over, and what is too many."""

import engine_shards as engines
import numpy as np
import pytest
from engine_shards import linted, of_engine

SCALE = np.ones((), np.float32)


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3-moe"])
def test_the_state_of_vllm_is_right(name, models, tmp_path):
    """Attention has scalars in it, and the experts of vLLM 0.32 are in another module."""
    model = models[name]
    ranks = [
        {key.replace(".experts.", ".experts.routed_experts."): x for key, x in held.items()}
        for held in of_engine("vllm", model, 2)
    ]
    for held in ranks:
        held |= {f"model.layers.0.self_attn.attn._{part}_scale": SCALE for part in ("k", "v", "q", "prob")}
        held["model.layers.0.self_attn.rotary_emb.cos_sin_cache"] = np.ones((9, 4), np.float32)
    result = linted(model, ranks, tmp_path)
    assert (result.faults, result.notes, result.engine) == ({}, {}, "vllm")
    assert all(tensor.by_name for tensor in result.tensors)


def test_tensors_that_cannot_be_weights_are_mentioned(models, tmp_path):
    model = models["llama"]
    ranks = of_engine("hf", model, 2)
    for held in ranks:
        held |= {"step": np.ones(3, np.int64), "mask": np.ones((2, 2), bool)}
        held |= {"loss_scale": SCALE, "amax": np.ones(1, np.float32)}
        held["patches.weight"] = np.ones((2, 2, 3, 3), np.float32)
    result = linted(model, ranks, tmp_path)
    assert result.faults == {}
    text = "5 tensors that cannot be weights: amax, loss_scale, mask, .."
    assert result.notes == {"not compared": text}


def test_buffers_are_passed_over(models, tmp_path):
    model = models["gemma2"]
    ranks = of_engine("hf", model, 2)
    for held in ranks:
        for buffer in ("sliding_attention_inv_freq", "full_attention_original_inv_freq", "inv_freq"):
            held[f"model.rotary_emb.{buffer}"] = np.ones(4, np.float32)
        held["model.rotary_emb_local.inv_freq"] = np.ones(4, np.float32)
    result = linted(model, ranks, tmp_path)
    assert (result.faults, result.notes) == ({}, {})


def test_another_model_in_the_same_files_is_mentioned(models, tmp_path):
    model = models["llama"]
    ranks = [{f"language_model.{name}": x for name, x in held.items()} for held in of_engine("hf", model, 2)]
    for held in ranks:
        for layer in (0, 5):
            name = f"vision_tower.encoder.layers.{layer}.self_attn.q_proj.weight"
            held[name] = np.ones((24, 24), np.float32)
        held["model.layers.0.visual.merger.bias"] = np.ones(24, np.float32)
        held["model.image_newline"] = np.ones(32, np.float32)
    result = linted(model, ranks, tmp_path)
    assert result.faults == {}
    texts = {
        "vision_tower": "2 tensors",
        "model.layers.0.visual": "1 tensor",
        "model.image_newline": "1 tensor",
    }
    assert result.notes == {
        f"{name}.*": f"{count} of another model, not compared" for name, count in texts.items()
    }


def test_a_name_in_another_model_is_not_that_of_a_layer(models, tmp_path):
    """An encoder's layer 0 is not the language model's; its values are looked up, and not found."""
    model = models["llama"]
    ranks = of_engine("hf", model, 2)
    name = "encoder.layers.0.self_attn.q_proj.weight"
    for held in ranks:
        held[name] = np.arange(16 * 32, dtype=np.float32).reshape(16, 32)
    result = linted(model, ranks, tmp_path)
    assert result.faults == {name: "is not in the checkpoint: none of its rows or columns is found there"}


def test_a_layer_that_the_model_does_not_have_is_wrong(models, tmp_path):
    model = models["llama"]
    ranks = of_engine("vllm", model, 2)
    for held in ranks:
        for part in ("mlp.gate_up_proj", "input_layernorm"):
            held[f"model.layers.9.{part}.weight"] = held[f"model.layers.1.{part}.weight"]
    result = linted(model, ranks, tmp_path)
    names = {f"model.layers.9.{part}.weight" for part in ("mlp.gate_up_proj", "input_layernorm")}
    assert result.faults == dict.fromkeys(names, "belongs to layer 9, but there are only layers 0:2")


SHAPES = {
    "a norm as a matrix": (
        "input_layernorm",
        lambda x: x[:, None],
        "rank 1 has shape [32, 1], expected a vector",
    ),
    "a flat matrix": ("self_attn.q_proj", np.ravel, "rank 1 has shape [512], expected a matrix"),
    "no columns": (
        "self_attn.q_proj",
        lambda x: x[:8, :0],  # as many rows as k_proj has
        "rank 1 has none of its rows from the checkpoint: its shape is [8, 0], expected 32 along axis 1",
    ),
    "four rows fewer": (
        "mlp.gate_proj",
        lambda x: x[:-4],
        "rank 1 has rows 24:44, but mlp.up_proj has rows 24:48",
    ),
    "four rows more": (
        "mlp.up_proj",
        lambda x: np.concatenate((x, x[:4])),
        "rank 1 has rows 24:48, 24:28, but mlp.gate_proj has rows 24:48",
    ),
    "a head fewer": ("self_attn.q_proj", lambda x: x[:-4], "rank 1 has heads 4:7, but o_proj has 4:8"),
    "a KV head fewer": (
        "self_attn.k_proj",
        lambda x: x[:0],
        "rank 1 has 4 query heads and 0 KV heads: a KV head must be read by equally many query heads",
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_only_the_tensor_with_the_wrong_shape_is_wrong(name, models, tmp_path):
    part, change, text = SHAPES[name]
    model = models["llama"]
    ranks = engines.of_engine("hf", model, 2)
    tensor = f"model.layers.1.{part}.weight"
    ranks[1][tensor] = change(ranks[1][tensor])
    assert linted(model, ranks, tmp_path).faults == {tensor: text}
