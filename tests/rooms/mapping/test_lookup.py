"""Tests of the tables of other engines' tensors."""

import re

import numpy as np
import pytest
from paths import GOLDENS

from minitp.loading.config import read_config
from minitp.loading.source import open_config
from minitp.mapping.lookup import TensorLookup, engine_of, rows_on_rank
from minitp.mapping.table import GROUPED, INTERLEAVED
from minitp.mapping.tensors import tensor_tables
from minitp.shard import make_plan

FAMILIES = sorted(path.parent.name for path in GOLDENS.glob("*/config.json"))
OF_OTHERS = {"hf", "vllm", "mlx"}  # engines that use a checkpoint's names unless their table has another


@pytest.mark.parametrize("family", FAMILIES)
def test_the_names_of_each_engine_reach_every_tensor(family):
    config = read_config(GOLDENS / family)
    known = make_plan(config, 1).tensors
    names = {name for name in known if re.match(r"(?!.*experts\.[1-9])(?!model\.layers\.(?!1\.))", name)}
    for engine, table in tensor_tables(config).items():
        lookup = TensorLookup(engine, config)
        reached = set(names) if engine in OF_OTHERS else set()
        for name in table:
            parts = lookup.find(name.format(i=1, n=0)).parts
            reached |= {part.format(n=0) for part in parts}
        assert names <= reached, engine


def test_a_name_is_filled_with_its_numbers():
    config = read_config(GOLDENS / "qwen3-moe")
    megatron = TensorLookup("megatron", config)
    assert megatron.find("module.decoder.layers.12.mlp.experts.linear_fc1.weight34").parts == (
        "model.layers.12.mlp.experts.34.gate_proj.weight",
        "model.layers.12.mlp.experts.34.up_proj.weight",
    )
    stacked = TensorLookup("vllm", config).find("model.layers.2.mlp.experts.w2_weight")
    assert stacked.parts == ("model.layers.2.mlp.experts.{n}.down_proj.weight",)
    unlisted = "model.layers.2.other.weight"
    assert TensorLookup("hf", config).find(unlisted).parts == (unlisted,)


def test_only_some_gguf_files_have_interleaved_heads():
    ropes = {
        family: TensorLookup("llama.cpp", read_config(GOLDENS / family)).find("blk.0.attn_q.weight").rope
        for family in FAMILIES
    }
    interleaved = {family for family, rope in ropes.items() if rope == INTERLEAVED}
    assert {"llama2", "mistral-v01", "mixtral", "smollm3", "granite"} <= interleaved
    assert not interleaved & {"qwen2", "qwen3", "qwen3-moe", "gemma2", "gemma3", "phi3"}


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "hf"),
        ("model.layers.0.self_attn.qkv_proj.weight", "vllm"),
        ("model.layers.0.mlp.experts.w13_weight", "vllm"),
        ("decoder.layers.0.mlp.linear_fc1.weight", "megatron"),
        ("module.decoder.layers.0.mlp.linear_fc1.weight", "megatron"),
        ("blk.0.ffn_up.weight", "llama.cpp"),
        ("model.layers.0.mlp.switch_mlp.up_proj.weight", "mlx"),
    ],
)
def test_an_engine_is_known_by_its_names(name, engine):
    assert engine_of(["model.norm.weight", name]) == engine


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 9])
def test_grouped_rows_are_those_of_the_plan(tp):
    """Each rank's rows of q, k and v are the plan's, with the query heads of a KV head before it."""
    config = open_config("random:smollm2-135m")
    plan, d = make_plan(config, tp), config.head_dim
    lookup = TensorLookup("megatron", config)
    tensor = lookup.find("decoder.layers.0.self_attention.linear_qkv.weight")
    assert tensor.order == GROUPED
    for rank in range(tp):
        blocks = rows_on_rank(tensor, plan, rank, d)
        for part in tensor.parts:
            rows = np.concatenate([np.arange(start, stop) for name, start, stop in blocks if name == part])
            held = plan.tensors[part].index(rank)[0]
            np.testing.assert_array_equal(rows, np.arange(held.start, held.stop))
        for q, k, v in zip(blocks[::3], blocks[1::3], blocks[2::3], strict=True):
            assert (q[0], k[0], v[0]) == tensor.parts
            assert k[1:] == v[1:]
            assert q[1] // (3 * d) == (q[2] - 1) // (3 * d) == k[1] // d


def test_plain_rows_are_those_of_the_plan():
    config = open_config("random:smollm2-135m")
    plan = make_plan(config, 4)
    tensor = TensorLookup("vllm", config).find("model.layers.3.mlp.gate_up_proj.weight")
    ranges = [(name, *plan.ffn_ranges[2]) for name in tensor.parts]
    assert rows_on_rank(tensor, plan, 2, config.head_dim) == ranges
