"""Experts on ranks: which ranks have them, in what order and under which numbers."""

import engine_shards as engines
import numpy as np
import pytest
from engine_shards import linted


def with_experts(model, tp, numbers, names):
    """Return ranks that hold whole experts, those of `numbers[rank]`; `names` are theirs on the rank."""
    ranks = engines.cut(model.tensors, model.config, tp)
    for rank, held in enumerate(ranks):
        for name in [name for name in held if ".experts." in name]:
            del held[name]
        for name, x in model.tensors.items():
            head, _, tail = name.partition(".experts.")
            number, _, matrix = tail.partition(".")
            if tail and int(number) in numbers[rank]:
                own = names[rank][numbers[rank].index(int(number))]
                held[f"{head}.experts.{own}.{matrix}"] = x
    return ranks


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("numbers", [[[0, 1], [2, 3]], [[0, 2], [1, 3]]])
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_may_be_on_ranks_and_counted_from_0(name, numbers, stacked, models, tmp_path):
    model = models[name]
    ranks = with_experts(model, 2, numbers, [[0, 1], [0, 1]])
    result = linted(model, engines.vllm(ranks) if stacked else ranks, tmp_path)
    assert (result.faults, result.notes) == ({}, {})


def test_experts_may_be_on_ranks_under_their_own_numbers(models, tmp_path):
    numbers = [[1, 2], [0, 3]]
    result = linted(models["mixtral"], with_experts(models["mixtral"], 2, numbers, numbers), tmp_path)
    assert (result.faults, result.notes) == ({}, {})


@pytest.mark.parametrize("numbers", [[[0, 1, 2], [3]], [[0, 1], [0, 1], [2, 3], [2, 3]]])
def test_ranges_of_experts_in_rank_order_are_right(numbers, models, tmp_path):
    """Experts may be unevenly many, and halves of the same experts may be on two ranks."""
    model = models["mixtral"]
    ranks = with_experts(model, len(numbers), numbers, [range(len(own)) for own in numbers])
    for rank in range(len(ranks) if len(ranks) == 4 else 0):
        for name in [name for name in ranks[rank] if ".experts." in name]:
            axis = int(name.endswith("w2.weight"))
            ranks[rank][name] = np.split(ranks[rank][name], 2, axis)[rank % 2]
    result = linted(model, engines.vllm(ranks), tmp_path)
    assert (result.faults, result.notes) == ({}, {})


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    ("numbers", "text"), [([[0, 1], [3, 2]], "0:2 | 3, 2"), ([[2, 3], [0, 1]], "2:4 | 0:2")]
)
def test_experts_in_another_order_need_a_map(numbers, text, stacked, models, tmp_path):
    model = models["mixtral"]
    ranks = with_experts(model, 2, numbers, [[0, 1], [0, 1]])
    result = linted(model, engines.vllm(ranks) if stacked else ranks, tmp_path)
    assert result.faults == {}
    note = f"the ranks have {text}: right only if the engine's map of experts says so"
    assert result.notes == {f"model.layers.{i}.block_sparse_moe.experts": note for i in range(2)}


@pytest.mark.parametrize(
    ("numbers", "times"), [([[0, 1, 2], [2, 3]], "twice"), ([[0, 2], [1, 2], [2], [3, 2]], "4 times")]
)
def test_an_expert_on_every_rank_is_summed_several_times(numbers, times, models, tmp_path):
    model = models["mixtral"]
    result = linted(model, with_experts(model, len(numbers), numbers, numbers), tmp_path)
    prefix = "model.layers.{}.block_sparse_moe.experts.2.{}.weight"
    assert set(result.faults) == {prefix.format(i, part) for i in range(2) for part in ("w1", "w2", "w3")}
    text = f"this expert is whole on every rank, others are not: its output is summed {times}"
    assert set(result.faults.values()) == {text}


def test_an_expert_that_the_model_does_not_have_is_wrong(models, tmp_path):
    model = models["mixtral"]
    ranks = engines.of_engine("hf", model, 2)
    name = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
    for held in ranks:
        held[name.format(7)] = held[name.format(0)]
    result = linted(model, ranks, tmp_path)
    assert result.faults == {name.format(7): "belongs to expert 7, but there are only experts 0:4"}
