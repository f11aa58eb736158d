"""Tests of query heads that do not find their KV heads, and heads of zeros."""

import engine_shards as engines
import numpy as np
import pytest
from engine_shards import linted, rows_of_heads

Q, K, V, OUT = (f"model.layers.1.self_attn.{letter}_proj.weight" for letter in "qkvo")
GLOBAL = "; right only if the engine picks the KV head by the global number"


def deal(ranks, whole, queries, kv_heads, outputs=None):
    """Give each rank some query heads and KV heads of 8; -1 is a head of zeros."""
    for rank, held in enumerate(ranks):
        lists = queries[rank], kv_heads[rank], kv_heads[rank], (outputs or queries)[rank]
        for name, heads in zip((Q, K, V, OUT), lists, strict=True):
            axis = int(name == OUT)
            padded = np.concatenate((whole[name], np.zeros_like(np.take(whole[name], range(8), axis))), axis)
            last = padded.shape[axis] // 8 - 1
            held[name] = np.take(padded, rows_of_heads([last if h < 0 else h for h in heads], 8), axis)


LOWER, UPPER = list(range(8)), list(range(8, 16))
CASES = {  # (query heads, KV heads, heads of o_proj or None, tensor, text); H = 16, K = 4
    "all KV heads": (
        (LOWER, UPPER),
        ([0, 1, 2, 3], [0, 1, 2, 3]),
        None,
        K,
        "rank 0 has 8 query heads and 4 KV heads, so local query head 2 reads local KV head 1: "
        f"query head 2 gets KV head 1, expected 0{GLOBAL}",
    ),
    "unequal counts": (
        ([0, 1, 2, 4, 8, 9, 10, 12], [3, 5, 6, 7, 11, 13, 14, 15]),
        ([0, 1, 2, 3], [0, 1, 2, 3]),
        None,
        Q,
        "does not agree with self_attn.k_proj: rank 0 has 8 query heads and 4 KV heads",
    ),
    "heads of zeros at the end": (
        ([*LOWER, -1, -1, -1, -1], [*UPPER, -1, -1, -1, -1]),
        ([0, 1], [2, 3]),
        None,
        Q,
        "rank 0 has 12 query heads and 2 KV heads, so local query head 4 reads local KV head 0",
    ),
    "heads of zeros in other places": (
        ([0, 1, 2, 3, -1, 4, 5, 6, 7, -1], [8, 9, 10, 11, -1, 12, 13, 14, 15, -1]),
        ([0, 1], [2, 3]),
        ([*LOWER, -1, -1], [*UPPER, -1, -1]),
        OUT,
        "rank 0 has heads 0:8, 2 of zeros, but q_proj has 0:4, 1 of zeros, 4:8, 1 of zeros",
    ),
    "a KV head of zeros": (
        (LOWER, UPPER),
        ([0, -1], [2, 3]),
        None,
        K,
        "query head 4 gets a KV head of zeros, expected 1",
    ),
    "3 KV heads for 8 query heads": (
        (LOWER, UPPER),
        ([0, 1, 1], [2, 3, 3]),
        None,
        K,
        "rank 0 has 8 query heads and 3 KV heads: a KV head must be read by equally many query heads",
    ),
}


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_query_heads_must_find_their_kv_heads(case, joined, models, tmp_path):
    model = models["wide"]
    queries, kv_heads, outputs, name, text = CASES[case]
    ranks = engines.of_engine("hf", model, 2)
    deal(ranks, model.tensors, queries, kv_heads, outputs)
    faults = linted(model, engines.vllm(ranks) if joined else ranks, tmp_path).faults
    if joined and name != OUT:
        name = "model.layers.1.self_attn.qkv_proj.weight"
        text = text.removeprefix("does not agree with self_attn.k_proj: ")
    assert text in faults[name]


@pytest.mark.parametrize("engine", ["hf", "vllm", "megatron"])
def test_a_head_of_zeros_for_each_kv_head_is_right(engine, models, tmp_path):
    model = models["wide"]
    ranks = engines.of_engine("hf", model, 2)
    queries = [[0, 1, 2, 3, -1, 4, 5, -1, 6, 7], [-1, 8, 9, 10, 11, 12, 13, 14, 15, -1]]
    deal(ranks, model.tensors, queries, [[0, 1], [2, 3]])
    if engine == "vllm":
        ranks = engines.vllm(ranks)
    if engine == "megatron":
        joined = [engines.grouped(held[Q], held[K], held[V], [5, 5]) for held in ranks]
        ends = [held[OUT] for held in ranks]
        ranks = engines.of_engine("megatron", model, 2)
        block = "module.decoder.layers.1.self_attention.linear"
        for held, qkv, out in zip(ranks, joined, ends, strict=True):
            held |= {f"{block}_qkv.weight": qkv, f"{block}_proj.weight": out}
    result = linted(model, ranks, tmp_path)
    assert result.faults == {}
    assert all("of padding" in text for text in result.notes.values())
