"""Tests of dumps with the names of other engines."""

import json

import numpy as np
import pytest
from dump_files import write
from engine_dumps import (
    DENSE,
    MIXTURE,
    PARTS,
    D,
    hf_steps,
    megatron_steps,
    megatron_weights,
    vllm_weights,
    weights_of,
    write_ranks,
)
from safetensors import safe_open

from minitp.compare.heads import interleaved
from minitp.compare.run import compare_files
from minitp.errors import InputError
from minitp.judge.files import RecordedFiles
from minitp.judge.recording import EngineRecording
from minitp.judge.run import judge
from minitp.loading.source import open_model
from minitp.trace.reference import open_oracle

CASES = {
    "megatron": (megatron_steps, DENSE),
    "hf": (hf_steps, DENSE),
    "vllm": (vllm_weights, DENSE),
    "vllm-experts": (vllm_weights, MIXTURE),
    "megatron-weights": (megatron_weights, DENSE),
}


@pytest.mark.parametrize("case", CASES)
def test_ranks_of_an_engine_are_put_together(case, references, tmp_path):
    dump, fields = CASES[case]
    reference = references(**fields)
    folder = write_ranks(tmp_path / "dump", dump, reference)
    result = compare_files(reference.path, folder, case.split("-")[0])
    assert result.departing == []
    assert result.not_compared == []
    assert result.only_b == []
    names = {step.name for step in result.steps}
    whole = {name for name in names if not name.startswith("rank")}
    counts = {"megatron": 2 * (3 + 2 * 11), "hf": 2 * (3 + 2 * 6), "megatron-weights": 2 * 4}
    assert len(whole) == counts.get(case, len(reference.plan.tensors))
    assert all(f"rank3/{name}" in names for name in whole if not name.endswith("/logits"))


@pytest.mark.parametrize("dump", [megatron_steps, vllm_weights])
def test_ranks_with_unequal_shares_are_put_together(dump, references, tmp_path):
    """A rank has 5 query heads on 2 KV heads, one of which two other ranks have, too."""
    reference, engine = references(split="5,1,1,2", **DENSE), dump.__name__.partition("_")[0]
    folder = write_ranks(tmp_path / "dump", dump, reference)
    result = compare_files(reference.path, folder, engine, split="5,1,1,2")
    assert (result.departing, result.not_compared) == ([], [])
    assert any(step.name.startswith("rank0/") for step in result.steps)
    equal = compare_files(reference.path, folder, engine)
    assert equal.departing or equal.not_compared, "equal shares join the heads in another way"
    with pytest.raises(InputError, match="--split '3,1' has 2 shares, but there are files of 4 ranks"):
        compare_files(reference.path, folder, engine, split="3,1")


def test_unequal_ranks_are_judged(references, tmp_path):
    reference = references(split="5,1,1,2", **DENSE)
    folder = write_ranks(tmp_path / "dump", megatron_steps, reference)
    with safe_open(reference.path, framework="np") as file:
        source, tokens = open_model(file.metadata()["model"], 1), json.loads(file.metadata()["token_ids"])
    files = RecordedFiles(folder, "megatron", source.config, split="5,1,1,2")
    recording = EngineRecording(files, source, tokens, "float32")
    assert judge(recording, open_oracle(source)).result.blamed() == []
    assert recording.plan.head_ranges == reference.plan.head_ranges


def test_the_order_of_joined_heads_matters_on_ranks_with_several_kv_heads(references, tmp_path, oracle_like):
    def plain(reference, rank):
        tensors = weights_of(reference, rank)
        name = "decoder.layers.0.self_attention.linear_qkv.weight"
        return {name: np.concatenate([tensors[f"model.layers.0.{part}.weight"] for part in PARTS])}

    folder = write_ranks(tmp_path / "dump", plain, references(**DENSE))
    result = compare_files(oracle_like(references(**DENSE)), folder, "megatron")
    names = {f"weights/model.layers.0.{part}.weight" for part in PARTS}
    assert {step.name for step in result.departing} == names
    assert {step.note for step in result.departing} == {"on rank 2 only"}


def test_all_ranks_may_be_wrong(references, tmp_path, oracle_like):
    def swapped(reference, rank):
        tensors = weights_of(reference, rank)
        parts = [tensors[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("up", "gate")]
        return {"decoder.layers.0.mlp.linear_fc1.weight": np.concatenate(parts)}

    folder = write_ranks(tmp_path / "dump", swapped, references(**DENSE))
    result = compare_files(oracle_like(references(**DENSE)), folder, "megatron")
    assert [step.note for step in result.departing] == ["on all ranks"] * 2


def test_gguf_names_and_interleaved_heads(references, tmp_path, oracle_like):
    """A GGUF file of a Llama model has the rows of q and k in pairs of neighbors."""
    reference = references(**DENSE)
    tensors = {name[8:]: x for name, x in reference.arrays.items() if name.startswith("weights/")}

    def gguf(name):
        rows = tensors[f"model.layers.1.{name}"].reshape(-1, D, 20)  # [n, d, D]
        return interleaved(rows.transpose(0, 2, 1)).transpose(0, 2, 1).reshape(-1, 20)

    dump = {
        "token_embd.weight": tensors["model.embed_tokens.weight"],
        "blk.1.attn_q.weight": gguf("self_attn.q_proj.weight"),
        "blk.1.attn_k.weight": gguf("self_attn.k_proj.weight"),
        "weights/blk.1.attn_v.weight": tensors["model.layers.1.self_attn.v_proj.weight"],
        "blk.1.ffn_norm.weight": tensors["model.layers.1.post_attention_layernorm.weight"],
    }
    b = write(tmp_path / "b.npz", dump)
    result = compare_files(oracle_like(reference), b, "llama.cpp")
    assert (len(result.steps), result.departing) == (5, [])
    wrong = compare_files(oracle_like(reference), b, "llama.cpp", rope="half")
    names = {f"weights/model.layers.1.{part}.weight" for part in PARTS[:2]}
    assert {step.name for step in wrong.departing} == names


def test_a_joined_array_of_another_size_is_not_compared(references, tmp_path, oracle_like):
    reference, a = references(**DENSE), oracle_like(references(**DENSE))
    wrong = {"decoder.layers.0.mlp.linear_fc1": np.zeros((7, 1, 75))}
    b = write(tmp_path / "b.npz", wrong)
    with pytest.raises(InputError, match=r"linear_fc1 \[7, 1, 75\]: expected 74 along axis -1, for "):
        compare_files(a, b, "megatron")
    b = write(tmp_path / "b.npz", wrong | {"embedding": reference.arrays["prefill/embed"]})
    result = compare_files(a, b, "megatron")
    assert (len(result.steps), result.departing) == (1, [])
    assert "decoder.layers.0.mlp.linear_fc1 [7, 1, 75] is not compared: expected 74" in result.remarks[0]


def test_an_engine_may_gather_joined_outputs(references, tmp_path, oracle_like):
    """Each rank may have the whole array, as in the Phi-3 of transformers."""
    reference = references(**DENSE)
    gate_up = [reference.arrays[f"prefill/layers.0.mlp.{part}"] for part in ("gate", "up")]
    joined = {"prefill/decoder.layers.0.mlp.linear_fc1": np.concatenate(gate_up, axis=-1)}
    folder = write_ranks(tmp_path / "dump", lambda reference, rank: joined, reference)
    result = compare_files(oracle_like(reference), folder, "megatron")
    assert ([step.name for step in result.steps], result.departing) == (
        ["prefill/layers.0.mlp.gate", "prefill/layers.0.mlp.up"],
        [],
    )


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("decoder.layers.5.self_attention.linear_qkv", (7, 1, 90)),
        ("model.layers.0.mlp.experts.w13_weight", (5, 20, 20)),
        ("model.layers.0.mlp.experts.w13_weight", ()),
        ("decoder.layers.0.mlp.linear_fc1", (7, 1, 20)),
    ],
)
def test_arrays_that_the_model_does_not_have_are_left_out(name, shape, references, tmp_path, oracle_like):
    reference = references(**MIXTURE)
    embed = {"embedding": reference.arrays["prefill/embed"], "model.norm.output": np.zeros((7, 20))}
    b = write(tmp_path / "b.npz", {name: np.zeros(shape), "prefill/embed": embed["embedding"]})
    for engine in ("megatron", "vllm"):
        result = compare_files(oracle_like(reference), b, engine)
        assert (len(result.steps), result.departing) == (1, [])
        assert name in " ".join([*result.only_b, *result.remarks])


def test_gguf_files_of_gemma_and_phi3(references, tmp_path, oracle_like):
    """Norms of Gemma are stored as 1 + w, and Phi-3's gate and up are called up."""
    gemma = {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "query_pre_attn_scalar": 6}
    gemma |= {"hidden_activation": "gelu_pytorch_tanh", "head_dim": 6, "pad_token_id": 0}
    phi3 = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "pad_token_id": 0}
    norms = {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"}
    reference = references(**gemma)
    tensors = weights_of(reference, 0)
    weights = {
        f"blk.1.{ours}.weight": 1 + tensors[f"model.layers.1.{name}.weight"] for ours, name in norms.items()
    }
    result = compare_files(oracle_like(reference), write(tmp_path / "b.npz", weights), "llama.cpp")
    assert (len(result.steps), result.departing) == (2, [])
    reference = references(**phi3)
    gate_up = [reference.arrays[f"weights/model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up")]
    b = write(tmp_path / "b.npz", {"blk.1.ffn_up.weight": np.concatenate(gate_up)})
    result = compare_files(oracle_like(reference), b, "llama.cpp")
    assert (len(result.steps), result.departing) == (2, [])


def test_a_reference_without_metadata_is_refused(tmp_path):
    a = write(tmp_path / "a.npz", {"prefill/embed": np.zeros((2, 3))})
    folder = tmp_path / "ranks"
    folder.mkdir()
    write(folder / "rank0.npz", {"prefill/embed": np.zeros((2, 3))})
    for b, mapping, text in ((folder, None, "a folder of ranks' files"), (a, "vllm", "--map vllm")):
        with pytest.raises(InputError, match=f"{text} needs the model's config, which .*a.npz lacks"):
            compare_files(a, b, mapping)


def test_the_steps_after_more_layers_are_not_compared(references, tmp_path, oracle_like):
    """The reference has two layers, and the engine ran three."""
    reference = references(**DENSE)
    dump = {"prefill/embed": reference.arrays["prefill/embed"], "prefill/logits": np.ones((7, 101))}
    dump["prefill/layers.2.mlp.residual"] = np.ones((7, 20))
    result = compare_files(oracle_like(reference), write(tmp_path / "b.npz", dump))
    assert [step.name for step in result.steps] == ["prefill/embed"]
    assert result.remarks[0].endswith("are not compared: the number of layers is 2 in A and 3 in B")


def test_an_unknown_engine_is_refused(references):
    path = references(**DENSE).path
    with pytest.raises(InputError, match="--map sglang: no such file, and none of the engines hf, "):
        compare_files(path, path, "sglang")
