"""Tests of the tables of other engines' steps."""

import pytest
from paths import GOLDENS

from minitp.loading.config import read_config
from minitp.mapping.steps import StepLookup
from minitp.mapping.tensors import ENGINES


def found(engine, family, name):
    """Return the layer and step of an array's name, or None."""
    match = StepLookup(engine, read_config(GOLDENS / family)).find(name)
    return match and (match[0], match[1].step)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.12.self_attn.o_proj.input", (12, "attn.context")),
        ("model.layers.12.self_attn.o_proj.input.0", (12, "attn.context")),
        ("model.layers.12.self_attn.o_proj", (12, "attn.out")),
        ("model.layers.12.self_attn.o_proj.output", (12, "attn.out")),
        ("model.layers.0", (0, "mlp.residual")),
        ("model.layers.0.input", (None, "embed")),
        ("model.norm", (None, "final_norm")),
        ("model.layers.1.self_attn.o_proj.input.1", None),
        ("model.layers.1.mlp.dropout", None),
    ],
)
def test_inputs_and_outputs_of_modules_are_steps(name, expected):
    assert found("hf", "llama2", name) == expected


def test_what_happens_outside_a_module_is_not_its_output():
    """The embeddings of Gemma 2 are multiplied after the table, and its logits capped after the head."""
    for name, step in (("model.embed_tokens", "embed"), ("lm_head", "logits")):
        assert found("hf", "llama2", name) == (None, step)
        assert found("hf", "gemma2", name) is None


def test_norms_have_other_names_in_gemma():
    assert found("hf", "gemma2", "model.layers.1.post_attention_layernorm") == (1, "attn.post_norm")
    assert found("hf", "llama2", "model.layers.1.post_attention_layernorm") == (1, "mlp.norm")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qcur-1", (1, "attn.q_rope")),  # the last array of the name
        ("Vcur-12", (12, "attn.v")),
        ("ffn_inp-0", (0, "attn.residual")),
        ("l_out-0", (0, "mlp.residual")),
        ("result_output", (None, "logits")),
        ("ffn_post_norm", None),  # no layer in the name
        ("kq_soft_max-1", None),  # 256 positions, of which most are not written
        ("norm-1", None),
    ],
)
def test_arrays_of_llama_cpp_are_steps(name, expected):
    assert found("llama.cpp", "llama2", name) == expected


def test_in_vllm_the_stream_is_an_output_of_the_next_norm():
    """The second output of a norm is the sum, so the last norm has that of the last layer."""
    assert found("vllm", "llama2", "model.layers.1.input_layernorm.output.1") == (0, "mlp.residual")
    assert found("vllm", "llama2", "model.norm.output.1") == (1, "mlp.residual")
    assert found("vllm", "llama2", "model.layers.1.post_attention_layernorm.output.1") == (1, "attn.residual")
    assert found("vllm", "llama2", "model.layers.0.self_attn.attn.input.1") == (0, "attn.k_rope")


def test_the_experts_of_mlx_lm_and_vllm_have_a_router():
    for engine in ("mlx", "vllm"):
        name = "model.layers.1.block_sparse_moe.gate"
        assert found(engine, "mixtral", name) == (1, "mlp.router")
        assert found(engine, "qwen3-moe", "model.layers.1.mlp.gate") == (1, "mlp.router")


@pytest.mark.parametrize("engine", ENGINES)
def test_every_family_has_a_table_of_each_engine(engine):
    names = {"megatron": "decoder.layers.1.mlp.linear_fc1", "llama.cpp": "attn_norm-1"}
    name = names.get(engine, "model.layers.1.self_attn.o_proj.input")
    step = {"megatron": "mlp.gate mlp.up", "llama.cpp": "attn.norm"}.get(engine, "attn.context")
    for path in GOLDENS.glob("*/config.json"):
        assert found(engine, path.parent.name, name) == (1, step)
