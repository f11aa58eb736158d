"""Tests of dumps with the names of other engines, and of folders with a file for each rank."""

import json

import numpy as np
import pytest
from dump_files import command, write
from safetensors import safe_open
from tiny import UNEVEN, write_tiny

from minitp.comm import run_threads
from minitp.compare.heads import interleaved
from minitp.compare.run import compare_files
from minitp.device import open_device
from minitp.errors import InputError
from minitp.load import load_model
from minitp.loading.source import open_model
from minitp.trace.record import passes_of, wanted_steps
from minitp.trace.write import write_trace

TP, D = 4, UNEVEN["head_dim"]
PROMPT = [100, 3, 40, 60, 80, 15, 25]
DENSE = {"attention_bias": True, "mlp_bias": True}
MIXTURE = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 3}
MIXTURE |= {"num_experts_per_tok": 2, "moe_intermediate_size": 10, "norm_topk_prob": True}
PARTS = [f"self_attn.{part}_proj" for part in "qkv"]
PASSES = ("prefill", "decode.1")


class Reference:
    """A trace of four ranks, with the whole arrays and those of each rank."""

    def __init__(self, path, plan):
        self.path, self.plan = path, plan
        with safe_open(path, framework="np") as file:
            self.arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def of_rank(self, rank):
        """Return a rank's arrays by name."""
        prefix = f"rank{rank}/"
        found = {name: x for name, x in self.arrays.items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): x for name, x in found.items()}


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Return a function that makes the Reference of a model, which it also caches."""
    root, made = tmp_path_factory.mktemp("references"), {}

    def make(**overrides):
        key = json.dumps(overrides)
        if key not in made:
            directory = write_tiny(root / str(len(made)), tokenizer=False, **{**UNEVEN, **overrides})
            path, source = root / f"{len(made)}.safetensors", open_model(str(directory), TP)
            passes, device = passes_of(len(PROMPT), 1), open_device()
            wanted = wanted_steps(source.plan, passes, ["*"])

            def rank(comm):
                model = load_model(source, comm, device)
                write_trace(path, source, model, PROMPT, passes, wanted, per_rank=True)

            run_threads(TP, rank)
            made[key] = Reference(path, source.plan)
        return made[key]

    return make


def flat(heads):
    """Join heads: [n, T, d] -> [T, n d]."""
    return heads.transpose(1, 0, 2).reshape(heads.shape[1], -1)


def grouped(plan, rank, q, k, v):
    """Join a rank's heads as Megatron does: [H, ..], [K, ..], [K, ..] -> [H + 2 K, ..]."""
    found = []
    for kv, (start, stop) in enumerate(plan.query_groups(rank)):
        found += [*q[start:stop], k[kv], v[kv]]
    return np.stack(found)


def megatron_steps(reference, rank):
    """Return a rank's arrays under the names of Megatron's modules, [T, 1, ..]."""
    ours, theirs = reference.of_rank(rank), {}
    for pass_name in PASSES:
        names = {"embedding": "embed", "decoder.final_layernorm.output": "final_norm"}
        names["output_layer.output.0"] = "logits_partial"
        for i in range(2):
            layer, step = f"decoder.layers.{i}", f"layers.{i}"
            names[f"{layer}.self_attention.linear_proj.input"] = f"{step}.attn.context"
            names[f"{layer}.self_attention.linear_proj.output"] = f"{step}.attn.out"
            names[f"{layer}.pre_mlp_layernorm"] = f"{step}.mlp.norm"
            names[f"{layer}.mlp.linear_fc2.input.0"] = f"{step}.mlp.act"
            names[layer] = f"{step}.mlp.residual"
            q, k, v, gate, up = (ours[f"{pass_name}/{step}.{x}"] for x in STEPS)
            joined = flat(grouped(reference.plan, rank, q, k, v))  # [T, (H + 2 K) d]
            theirs[f"{pass_name}/{layer}.self_attention.linear_qkv.output.0"] = joined[:, None]
            theirs[f"{pass_name}/{layer}.mlp.linear_fc1"] = np.concatenate((gate, up), axis=-1)[:, None]
            key = ours[f"{pass_name}/{step}.attn.k_rope"].transpose(1, 0, 2)[:, None]  # [T, 1, K, d]
            theirs[f"{pass_name}/{layer}.self_attention.core_attention.input.1"] = key
        theirs |= {
            f"{pass_name}/{name}": ours[f"{pass_name}/{step}"][:, None] for name, step in names.items()
        }
    return theirs


STEPS = ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up")


def hf_steps(reference, rank):
    """Return a rank's arrays under the names of transformers' modules, [1, T, ..]."""
    ours, theirs = reference.of_rank(rank), {}
    for pass_name in PASSES:
        for i in range(2):
            layer, step = f"{pass_name}/model.layers.{i}", f"{pass_name}/layers.{i}"
            for part in "qkv":
                theirs[f"{layer}.self_attn.{part}_proj"] = flat(ours[f"{step}.attn.{part}"])[None]
            theirs[f"{layer}.mlp.up_proj.output"] = ours[f"{step}.mlp.up"][None]
            theirs[f"{layer}.mlp.down_proj.input"] = ours[f"{step}.mlp.act"][None]
            theirs[f"{layer}.output.0"] = ours[f"{step}.mlp.residual"][None]
        theirs[f"{pass_name}/lm_head"] = ours[f"{pass_name}/logits_partial"][None]
        theirs[f"{pass_name}/model.norm"] = ours[f"{pass_name}/final_norm"][None]
        theirs[f"{pass_name}/model.embed_tokens"] = ours[f"{pass_name}/embed"][None]
    return theirs


def weights_of(reference, rank):
    """Return a rank's weights under the checkpoint's names."""
    arrays = reference.of_rank(rank)
    return {name[8:]: array for name, array in arrays.items() if name.startswith("weights/")}


def vllm_weights(reference, rank):
    """Return a rank's weights under vLLM's names: joined projections, stacked experts."""
    tensors = weights_of(reference, rank)
    for i in range(2):
        layer = f"model.layers.{i}"
        for kind in ("weight", "bias"):
            if f"{layer}.self_attn.q_proj.{kind}" in tensors:
                parts = [tensors.pop(f"{layer}.{part}.{kind}") for part in PARTS]
                tensors[f"{layer}.self_attn.qkv_proj.{kind}"] = np.concatenate(parts)
            if f"{layer}.mlp.gate_proj.{kind}" in tensors:
                parts = [tensors.pop(f"{layer}.mlp.{part}_proj.{kind}") for part in ("gate", "up")]
                tensors[f"{layer}.mlp.gate_up_proj.{kind}"] = np.concatenate(parts)
        if f"{layer}.mlp.experts.0.up_proj.weight" in tensors:
            gate, up, down = (
                np.stack([tensors.pop(f"{layer}.mlp.experts.{n}.{part}_proj.weight") for n in range(3)])
                for part in ("gate", "up", "down")
            )
            tensors[f"{layer}.mlp.experts.w13_weight"] = np.concatenate((gate, up), axis=1)
            tensors[f"{layer}.mlp.experts.w2_weight"] = down
    return tensors


def megatron_weights(reference, rank):
    """Return a rank's matrices under Megatron's names."""
    tensors, theirs = weights_of(reference, rank), {}
    for i in range(2):
        q, k, v = (tensors[f"model.layers.{i}.{part}.weight"].reshape(-1, D, 20) for part in PARTS)
        joined = grouped(reference.plan, rank, q, k, v)  # [H + 2 K, d, D]
        theirs[f"module.decoder.layers.{i}.self_attention.linear_qkv.weight"] = joined.reshape(-1, 20)
        theirs[f"module.decoder.layers.{i}.mlp.linear_fc2.weight"] = tensors[
            f"model.layers.{i}.mlp.down_proj.weight"
        ]
    return theirs


def write_ranks(folder, dump, reference, kind="npz"):
    """Write what a function of a reference and a rank returns to a file for each rank."""
    folder.mkdir()
    for rank in range(TP):
        arrays = {name: np.ascontiguousarray(x) for name, x in dump(reference, rank).items()}
        write(folder / f"rank{rank}.{kind}", arrays)
    return folder


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


def broken(dump, change, at):
    """Return a function like `dump` in which one rank's arrays are changed."""

    def changed(reference, rank):
        arrays = dump(reference, rank)
        if rank == at:
            change(arrays)
        return arrays

    return changed


def scaled(name):
    def change(arrays):
        arrays[name] = 1.5 * arrays[name]

    return change


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


@pytest.fixture
def oracle_like(tmp_path):
    """Return a function that writes a reference's whole arrays alone, with its metadata."""

    def make(reference):
        with safe_open(reference.path, framework="np") as file:
            metadata = file.metadata()
        whole = {name: x for name, x in reference.arrays.items() if not name.startswith("rank")}
        return write(tmp_path / "oracle.safetensors", whole, **metadata)

    return make


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


def test_a_joined_array_of_another_size_is_refused(references, tmp_path, oracle_like):
    b = write(tmp_path / "b.npz", {"decoder.layers.0.mlp.linear_fc1": np.zeros((7, 1, 75))})
    with pytest.raises(
        InputError, match=r"linear_fc1 has shape \[7, 1, 75\], expected 74 in axis -1 for model"
    ):
        compare_files(oracle_like(references(**DENSE)), b, "megatron")


def test_a_reference_without_metadata_is_refused(tmp_path):
    a = write(tmp_path / "a.npz", {"prefill/embed": np.zeros((2, 3))})
    folder = tmp_path / "ranks"
    folder.mkdir()
    write(folder / "rank0.npz", {"prefill/embed": np.zeros((2, 3))})
    for b, mapping, text in ((folder, None, "a folder of ranks' files"), (a, "vllm", "--map vllm")):
        with pytest.raises(InputError, match=f"{text} needs the model's config, which .*a.npz lacks"):
            compare_files(a, b, mapping)


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
