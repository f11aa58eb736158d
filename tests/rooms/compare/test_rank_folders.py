"""Tests of folders with a file for each rank: their arrays are put together, and a rank is blamed."""

import numpy as np
import pytest
from dump_files import command, write
from engine_dumps import (
    DENSE,
    broken,
    hf_steps,
    scaled,
    write_ranks,
)

from minitp.compare.run import compare_files
from minitp.errors import InputError


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("prefill/model.layers.1.self_attn.k_proj", "prefill/layers.1.attn.k"),
        ("decode.1/model.layers.0.mlp.down_proj.input", "decode.1/layers.0.mlp.act"),
        ("prefill/model.layers.0.output.0", "prefill/layers.0.mlp.residual"),
        ("decode.1/lm_head", "decode.1/logits"),
    ],
)
@pytest.mark.parametrize("at", [0, 2])
def test_a_wrong_rank_is_blamed(name, step, at, references, tmp_path, oracle_like):
    """The array of `mlp.residual` should be on all ranks, and only a later rank may be wrong."""
    folder = write_ranks(tmp_path / "dump", broken(hf_steps, scaled(name), at), references(**DENSE))
    result = compare_files(oracle_like(references(**DENSE)), folder, "hf")
    assert [found.name for found in result.departing] == [step]
    assert result.departing[0].note.startswith(f"on rank {at} only")


def test_partial_sums_are_added(references, tmp_path, oracle_like):
    def partial(reference, rank):
        return {name: x for name, x in reference.of_rank(rank).items() if name.endswith("out_partial")}

    reference = references(**DENSE)
    folder = write_ranks(tmp_path / "dump", partial, reference, "safetensors")
    assert compare_files(oracle_like(reference), folder).departing == []
    half = broken(partial, scaled("prefill/layers.0.mlp.out_partial"), 1)
    folder = write_ranks(tmp_path / "half", half, reference, "safetensors")
    wrong = compare_files(oracle_like(reference), folder).departing
    assert [step.name for step in wrong] == ["prefill/layers.0.mlp.out_partial"]
    assert "rank" not in wrong[0].note


def test_each_copy_of_a_kv_head_is_compared(references, tmp_path, oracle_like):
    """Ranks 1 and 2 both have KV head 1, and the later copy may not hide the earlier one."""
    for rank in (1, 2):
        names = [f"prefill/model.layers.0.self_attn.{part}_proj" for part in "kv"]
        folder = tmp_path / str(rank)
        write_ranks(folder, broken(hf_steps, scaled(names[0]), rank), references(**DENSE))
        result = compare_files(oracle_like(references(**DENSE)), folder, "hf")
        assert [(step.name, step.note) for step in result.departing] == [
            ("prefill/layers.0.attn.k", f"on rank {rank} only")
        ]


def test_an_array_that_a_rank_lacks_is_not_compared(references, tmp_path, oracle_like):
    reference, name = references(**DENSE), "prefill/model.layers.0.output.0"

    def dump(reference, rank):
        arrays = hf_steps(reference, rank)
        if rank == 1:
            del arrays[name]
        if rank == 2:
            arrays[name] = 3 * arrays[name]
        if rank == 3:
            del arrays["prefill/model.layers.1.mlp.up_proj.output"]
        return arrays

    folder = write_ranks(tmp_path / "dump", dump, reference)
    result = compare_files(oracle_like(reference), folder, "hf")
    assert result.departing == []
    assert {one.name: one.reason for one in result.not_compared} == {
        "prefill/layers.0.mlp.residual": "rank 1 of 4 has no such array",
        "prefill/layers.1.mlp.up": "rank 3 of 4 has no such array",
    }
    assert not {one.name for one in result.not_compared} & {*result.only_a, *result.only_b}


def test_the_vocabulary_may_be_padded(references, tmp_path, oracle_like):
    """The padding makes the ranks' parts others than the plan's, in a multiple of 64 for example."""
    reference = references(**DENSE)
    tensors = {name[8:]: x for name, x in reference.arrays.items() if name.startswith("weights/")}

    def dump(reference, rank):
        names = ("lm_head.weight", "model.embed_tokens.weight")
        padded = [np.pad(tensors[name], ((0, 27), (0, 0))) for name in names]
        logits = np.pad(reference.arrays["prefill/logits"], ((0, 0), (0, 27)))  # 101 -> 128
        rows = slice(32 * rank, 32 * (rank + 1))
        return {
            "lm_head.weight": padded[0][rows],
            "model.embed_tokens.weight": padded[1][rows],
            "logits_processor": logits[:, rows],
        }

    folder = write_ranks(tmp_path / "dump", dump, reference)
    result = compare_files(oracle_like(reference), folder, "vllm")
    assert (len(result.steps), result.departing, result.not_compared) == (3, [], [])
    wrong = write_ranks(tmp_path / "wrong", broken(dump, scaled("lm_head.weight"), 2), reference)
    result = compare_files(oracle_like(reference), wrong, "vllm")
    found = [(step.name, step.note) for step in result.departing]
    assert found == [("weights/lm_head.weight", "on rank 2 only")]


def test_the_tolerance_is_that_of_the_coarsest_rank(references, tmp_path, oracle_like):
    def dump(reference, rank):
        arrays = hf_steps(reference, rank)
        return {name: x.astype(np.float16 if rank == 3 else np.float32) for name, x in arrays.items()}

    folder = write_ranks(tmp_path / "dump", dump, references(**DENSE))
    result = compare_files(oracle_like(references(**DENSE)), folder, "hf")
    assert (result.tolerance, result.departing) == (2e-2, [])


def test_a_missing_file_is_suspected(references, tmp_path, oracle_like):
    folder = write_ranks(tmp_path / "dump", hf_steps, references(**DENSE))
    (folder / "rank3.npz").unlink()
    result = compare_files(oracle_like(references(**DENSE)), folder, "hf")
    reasons = {one.name: one.reason for one in result.not_compared}
    expected = "B 3 ranks with [1, 7, 10] and [1, 7, 9]; is a file missing, or one too many?"
    assert reasons["prefill/layers.0.mlp.up"].endswith(expected)
    for rank in range(3, 12):
        write(folder / f"rank{rank}.npz", {"prefill/embed": np.zeros((7, 20))})
    with pytest.raises(InputError, match="files of 12 ranks, but the model has only 9 attention heads"):
        compare_files(oracle_like(references(**DENSE)), folder, "hf")


def test_the_command_names_the_rank(references, tmp_path, capsys):
    name = "prefill/model.layers.0.self_attn.q_proj"
    folder = write_ranks(tmp_path / "dump", broken(hf_steps, scaled(name), 3), references(**DENSE))
    code, printed = command(capsys, references(**DENSE).path, folder, "--map", "hf")
    assert code == 1
    assert printed.splitlines()[-1].startswith(
        "first differing step: prefill/layers.0.attn.q: relative error"
    )
    assert "on rank 3 only" in printed.splitlines()[-1]
    assert "rank3/prefill/layers.0.attn.q" in printed
