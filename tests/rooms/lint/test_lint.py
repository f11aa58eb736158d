"""Shards of several engines that are right, and the files that hold them."""

import engine_shards as engines
import ml_dtypes
import numpy as np
import pytest
from engine_shards import DENSE, linted, of_engine

from minitp.compare.rank_folder import open_ranks, rank_of
from minitp.errors import InputError
from minitp.lint.run import lint

PAIRS = [(name, engine) for name in engines.MODELS for engine in ("hf", "vllm")]
PAIRS += [(name, "megatron") for name in DENSE]


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
@pytest.mark.parametrize(("name", "engine"), PAIRS)
def test_right_shards_are_right(name, engine, tp, models, tmp_path):
    model = models[name]
    result = linted(model, of_engine(engine, model, tp), tmp_path)
    assert (result.faults, result.notes) == ({}, {})


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize(
    "file", ["rank{}.safetensors", "tp_rank_{}/weights.npz", "mp_rank_0{}/model.safetensors"]
)
def test_shards_may_have_another_dtype(file, dtype, models, tmp_path):
    model = models["uneven"]
    ranks = [{name: x.astype(dtype) for name, x in held.items()} for held in of_engine("vllm", model, 3)]
    result = linted(model, ranks, tmp_path, file=file)
    assert (result.faults, result.notes) == ({}, {})


def test_the_files_of_a_rank_may_be_several_parts(models, tmp_path):
    """Read the files of vLLM's save_sharded_state: model-rank-{rank}-part-{part}.safetensors."""
    model = models["llama"]
    for rank, held in enumerate(of_engine("vllm", model, 2)):
        names = sorted(held)
        for part, some in enumerate((names[::2], names[1::2])):
            file = f"model-rank-{rank}-part-{part}.safetensors"
            engines.write(tmp_path, [{name: held[name] for name in some}], file)
    result = lint(open_ranks(tmp_path), model.source)
    assert (result.faults, result.notes, result.engine) == ({}, {}, "vllm")


def test_a_checkpoint_that_is_not_sharded_is_one_rank(models, tmp_path):
    model = models["phi3"]
    assert lint(open_ranks(model.source.directory), model.source).faults == {}
    assert lint(open_ranks(model.source.directory / "model.safetensors"), model.source).faults == {}


@pytest.mark.parametrize("padding", ["zeros", "the last row", "anything"])
def test_the_vocabulary_may_be_padded_at_its_end(padding, models, tmp_path):
    model = models["uneven"]
    ranks = of_engine("hf", model, 4)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = model.tensors[name]
        fill = {
            "zeros": np.zeros_like(rows),
            "the last row": rows[-1:].repeat(101, 0),
            "anything": rows[::-1] + 1,
        }[padding]
        padded = np.concatenate((rows, fill))[:160]
        for rank, held in enumerate(ranks):
            held[name] = padded[40 * rank : 40 * (rank + 1)]
    result = linted(model, ranks, tmp_path)
    assert (result.faults, result.notes) == ({}, {})


def test_tied_embeddings_may_have_either_name(models, tmp_path):
    """Accept lm_head.weight, which vLLM's sharded state has if the two share memory."""
    model = models["tied"]
    ranks = of_engine("vllm", model, 2)
    for held in ranks:
        held["lm_head.weight"] = held.pop("model.embed_tokens.weight")
    assert linted(model, ranks, tmp_path).faults == {}


@pytest.mark.parametrize("prefix", ["_orig_mod.", "model.language_model.", "module.module."])
def test_prefixes_of_wrappers_are_removed(prefix, models, tmp_path):
    model = models["uneven"]
    ranks = [
        {prefix + name.removeprefix("model."): x for name, x in held.items()}
        for held in of_engine("vllm", model, 2)
    ]
    result = linted(model, ranks, tmp_path)
    assert (result.faults, result.notes) == ({}, {})
    assert all(tensor.by_name for tensor in result.tensors)


@pytest.mark.parametrize(
    ("name", "engine"),
    [pair for pair in PAIRS if pair[0] in ("llama", "uneven", "bias")],
)
def test_tensors_are_found_by_content(name, engine, models, tmp_path):
    model = models[name]
    ranks = of_engine(engine, model, 2)
    numbers = {key: number for number, key in enumerate(ranks[0])}
    ranks = [{f"weight_{numbers[key]}": x for key, x in held.items()} for held in ranks]
    result = linted(model, ranks, tmp_path)
    assert (result.faults, result.notes) == ({}, {})
    assert not any(tensor.by_name for tensor in result.tensors)
    assert {part for tensor in result.tensors for part in tensor.layout.parts} == set(
        model.source.plan.tensors
    )


# --- right, but unusual ---------------------------------------------------------------------------------


def test_a_permutation_of_heads_in_which_all_agree_is_right(models, tmp_path):
    """The two ranks' files of the layers are exchanged, but not the vocabulary."""
    model = models["llama"]
    first, second = of_engine("hf", model, 2)
    for name in first:
        if "layers" in name:
            first[name], second[name] = second[name], first[name]
    result = linted(model, [first, second], tmp_path)
    assert result.faults == {}
    assert set(result.notes) == {name for name in first if "_proj" in name}
    text = result.notes["model.layers.1.mlp.down_proj.weight"]
    assert text.startswith("consistent, but not contiguous: rank 0 has columns 24:48, expected columns 0:24")


def test_kv_heads_on_exchanged_uneven_ranks_are_told_as_they_are(tmp_path):
    """Ranks 1 and 2 of 4 have 1 and 2 of the 3 KV heads; exchanged, no rank has what the plan expects."""
    model = engines.Model(tmp_path / "model", "uneven")
    ranks = of_engine("hf", model, 4)
    ranks[1], ranks[2] = ranks[2], ranks[1]
    result = linted(model, ranks, tmp_path)
    note = result.notes["model.layers.0.self_attn.k_proj.weight"]
    assert "rank 1 has rows 6:18; rank 2 has rows 6:12" in note
    assert "zeros" not in note


def test_strided_columns_in_which_all_agree_are_right(models, tmp_path):
    model = models["llama"]
    ranks = of_engine("hf", model, 2)
    for rank, held in enumerate(ranks):
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.0.mlp.{part}.weight"
            held[name] = (
                model.tensors[name][rank::2] if part != "down_proj" else model.tensors[name][:, rank::2]
            )
    result = linted(model, ranks, tmp_path)
    assert result.faults == {}
    assert len(result.notes) == 3


def test_attention_may_be_whole_on_every_rank(models, tmp_path):
    model = models["llama"]
    ranks = of_engine("hf", model, 4)
    for held in ranks:
        held.update({name: x for name, x in model.tensors.items() if "self_attn" in name})
    result = linted(model, ranks, tmp_path)
    assert (result.faults, result.notes) == ({}, {})


@pytest.mark.parametrize("elsewhere", ["zero", "absent", "divided"])
def test_a_bias_may_be_added_before_the_sum(elsewhere, models, tmp_path):
    model = models["bias"]
    ranks = of_engine("hf", model, 2)
    names = [name for name in ranks[1] if name.endswith(("o_proj.bias", "down_proj.bias"))]
    for name in names:
        bias = ranks[1].pop(name)
        if elsewhere == "zero":
            ranks[1][name] = np.zeros_like(bias)
        if elsewhere == "divided":
            ranks[0][name], ranks[1][name] = bias / 2, bias / 2
    result = linted(model, ranks, tmp_path)
    assert result.faults == {}
    assert set(result.notes) == set(names)


def test_transformers_cuts_joined_matrices_as_wholes(models, tmp_path):
    """The tp_plan of Phi-3 gathers the outputs and splits the inputs of the next matrix."""
    model = models["phi3"]
    whole, ranks = engines.vllm([model.tensors])[0], engines.vllm(engines.cut(model.tensors, model.config, 3))
    for rank, held in enumerate(ranks):
        for name in [name for name in held if ".layers." in name and held[name].ndim == 2]:
            axis = int(name.endswith(("o_proj.weight", "down_proj.weight")))
            held[name] = np.array_split(whole[name], 3, axis)[rank]
    joined = {name for name in whole if ".qkv_proj." in name or ".gate_up_proj." in name}
    result = linted(model, ranks, tmp_path, engine="hf")
    assert result.faults == {}
    assert joined <= result.notes.keys()
    assert joined <= linted(model, ranks, tmp_path).faults.keys()


def test_padding_of_ffn_columns_that_agrees_is_right(models, tmp_path):
    model = models["uneven"]  # 37 columns: 13, 12 and 12 on three ranks
    ranks = of_engine("hf", model, 3)
    for held in ranks:
        for name, x in held.items():
            if ".mlp." in name:
                more = 16 - x.shape[name.endswith("down_proj.weight")]
                pad = ((0, 0), (0, more)) if name.endswith("down_proj.weight") else ((0, more), (0, 0))
                held[name] = np.pad(x, pad)
    assert linted(model, ranks, tmp_path).faults == {}
    assert linted(model, engines.vllm(ranks), tmp_path / "joined").faults == {}


def test_equal_tensors_are_each_found(models, tmp_path):
    """Norms of a model that is not trained are all ones."""
    model = models["uneven"]
    ones = {name: np.ones_like(x) if "norm" in name else x for name, x in model.tensors.items()}
    fresh = engines.Model(tmp_path / "fresh", "uneven", ones)
    ranks = of_engine("hf", fresh, 3)
    ranks = [{f"w{number}": x for number, x in enumerate(held.values())} for held in ranks]
    result = linted(fresh, ranks, tmp_path)
    assert (result.faults, result.notes) == ({}, {})


def test_equal_rows_are_not_mistaken_for_one_another(models, tmp_path):
    """Vocabulary rows that no text uses are often equal, and biases are often zero."""
    model = models["bias"]
    repeated = {
        name: np.zeros_like(x) if name.endswith("bias") else x.copy() for name, x in model.tensors.items()
    }
    repeated["model.embed_tokens.weight"][100:200] = repeated["model.embed_tokens.weight"][7]
    source = engines.Model(tmp_path / "repeated", "bias", repeated)
    ranks = of_engine("vllm", source, 3)
    result = linted(source, ranks, tmp_path)
    assert (result.faults, result.notes) == ({}, {})


# --- files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("rank0.safetensors", 0),
        ("rank_12", 12),
        ("model-rank-3-part-0.safetensors", 3),
        ("mp_rank_01", 1),
        ("tp_rank_2", 2),
        ("model2-mp4.safetensors", 2),
        ("tp1.npz", 1),
        ("llama_tp2_0.safetensors", 0),
        ("model-tp2-r1.npz", 1),
        ("model-tp-1-of-2.safetensors", 1),
        ("tp1-00001-of-00002.safetensors", 1),
        ("model-00001-of-00002.safetensors", None),
        ("plan.json", None),
    ],
)
def test_the_rank_is_in_the_name(name, rank):
    assert rank_of(name) == rank


def test_files_that_cannot_be_linted_are_refused(models, tmp_path):
    model = models["llama"]
    ranks = of_engine("hf", model, 4)

    def refused(words, path):
        with pytest.raises(InputError) as error:
            lint(open_ranks(path), model.source)
        assert words in str(error.value)

    for path in (tmp_path / "meta", tmp_path / "meta/consolidated.00.safetensors"):
        engines.write(tmp_path / "meta", ranks[:1], "consolidated.0{}.safetensors")
        refused("consolidated.00.safetensors: a file in Meta's own format", path)
    engines.write(tmp_path / "gap", ranks)
    (tmp_path / "gap/rank2.safetensors").unlink()
    refused("has files of 3 ranks up to rank 3, but none of rank 2", tmp_path / "gap")
    (tmp_path / "mp_rank_00").mkdir()
    (tmp_path / "mp_rank_00/model_optim_rng.pt").write_bytes(b"pickle")
    refused("model_optim_rng.pt is a pickle", tmp_path)
    (tmp_path / "pipeline/mp_rank_00_001").mkdir(parents=True)
    refused("pipeline", tmp_path / "pipeline")
    refused("no arrays found", tmp_path / "pipeline/mp_rank_00_001")
    refused("no such file", tmp_path / "nowhere")
    engines.write(tmp_path / "megatron/iter_0000100", ranks, "mp_rank_0{}/model.safetensors")
    refused("its folder iter_0000100 has some", tmp_path / "megatron")
    engines.write(tmp_path / "twice", ranks[:1])
    engines.write(tmp_path / "twice", ranks[:1], "rank-{}-again.safetensors")
    refused("is also in", tmp_path / "twice")
    engines.write(tmp_path / "quantized", [{"model.norm.weight": np.zeros(32, np.int8)}])
    refused("has dtype int8", tmp_path / "quantized")
    engines.write(tmp_path / "axes", [{"model.norm.weight": np.zeros((2, 2, 32), np.float32)}])
    refused("has shape [2, 2, 32], expected", tmp_path / "axes")
    stacks = {"model.layers.0.block_sparse_moe.experts.w2_weight": np.zeros((5, 32, 48), np.float32)}
    engines.write(tmp_path / "experts", [stacks])
    model = models["mixtral"]
    refused("has 5 experts, but a layer of the model has 4", tmp_path / "experts")
    model = models["llama"]
    engines.write(tmp_path / "foreign", [{"weight": np.ones((3, 5), np.float32)}])
    refused("no tensor belongs to", tmp_path / "foreign")
