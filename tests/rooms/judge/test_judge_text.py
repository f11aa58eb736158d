"""The output of `minitp judge`: the verdict, the remarks about names and experts, and the table."""

import json

import numpy as np
import pytest
from paths import GOLDENS, PROBED, SUPPORT
from safetensors import safe_open
from safetensors.numpy import save_file

from minitp.check.difference import difference_of
from minitp.cli.main import main
from minitp.compare.heads import interleaved

LLAMA = PROBED / "llama2.safetensors"
FAULTY = SUPPORT / "faulty_recordings"


def read(path):
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.fixture
def judge(tmp_path, capsys):
    """A function that judges a recording changed by change(arrays); returns exit code, output and errors."""

    def judge(change=lambda arrays: arrays, *options, path=LLAMA, model="llama2", is_trace=True):
        arrays, metadata = read(path)
        arrays = change(arrays) or arrays
        target = tmp_path / ("engine.safetensors" if is_trace else "engine.npz")
        save_file(arrays, target, metadata) if is_trace else np.savez(target, **arrays)
        model = ["--model", str(GOLDENS / model)] if model else []
        code = main(["judge", str(target), *model, *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return judge


def noisy(name, size):
    """Return a change that adds noise of a size to an array, relative to its largest element."""

    def change(arrays):
        noise = np.random.default_rng(0).normal(size=arrays[name].shape)
        arrays[name] = arrays[name] + (noise * size * np.abs(arrays[name]).max()).astype(np.float32)

    return change


# --- blame ----------------------------------------------------------------------------------------------


def test_an_error_just_above_its_bound_does_not_hide_a_fault(judge):
    def change(arrays):
        noisy("prefill/layers.0.attn.q", 2e-7)(arrays)
        arrays["prefill/layers.1.mlp.up"] *= 1.25

    code, out, _ = judge(change)
    assert code == 1
    *_, verdict, slight, mistake = out.splitlines()
    assert verdict.startswith("first wrong operation: prefill/layers.1.mlp.up, layer 1, rank 0: ")
    assert slight.startswith("also slightly above its bound: prefill/layers.0.attn.q, rank 0 (1")
    assert mistake == "what it seems to compute: the right result times 1.25"


def test_errors_that_are_all_just_above_their_bounds_are_blamed_in_order(judge):
    def change(arrays):
        noisy("prefill/layers.0.attn.q", 2e-7)(arrays)
        noisy("prefill/layers.1.mlp.up", 2e-7)(arrays)

    code, out, _ = judge(change)
    assert code == 1
    assert "first wrong operation: prefill/layers.0.attn.q, " in out
    assert "also slightly" not in out


def test_the_digits_of_two_numbers_show_that_they_differ():
    text = str(difference_of(np.array([0.3630761, 2]), np.array([0.3630760, 2])))
    assert text.endswith("at [0] it is 0.3630761, expected 0.363076")
    assert str(difference_of(np.array([1.5]), np.array([1.25]))).endswith("it is 1.5, expected 1.25")


def test_a_mistake_that_is_not_known_is_said_so(judge):
    code, out, _ = judge(noisy("prefill/layers.1.attn.probs", 0.1))
    assert code == 1
    assert out.splitlines()[-1] == (
        "no common mistake explains it: compare the operation, its weight and its settings; attn.scores, "
        "which it includes, would tell more if recorded"
    )


# --- names ----------------------------------------------------------------------------------------------


def renamed(**new_names):
    def change(arrays):
        return {
            next(
                (name.replace(f"attn.{old}", new) for old, new in new_names.items() if name.endswith(old)),
                name,
            ): x
            for name, x in arrays.items()
        }

    return change


def test_unknown_names_are_listed_with_the_likely_ones(judge):
    code, out, _ = judge(renamed(q_rope="attn.qrope", v_cache="attn.vcache"), is_trace=False)
    assert code == 0
    line = "not judged: 8 arrays with unknown names: "
    listed = out.partition(line)[2].splitlines()[0]
    assert "prefill/layers.*.attn.qrope (attn.q_rope?)" in listed
    assert "attn.vcache (attn.v_cache?)" in listed


def test_a_step_that_the_model_has_not_is_said_so(judge):
    def change(arrays):
        arrays["prefill/layers.0.attn.q_norm"] = arrays["prefill/layers.0.attn.q"]

    assert (
        "not judged, because the model has no such steps: attn.q_norm\n" in judge(change, is_trace=False)[1]
    )


@pytest.mark.parametrize("path", sorted(PROBED.glob("*.safetensors")), ids=lambda path: path.stem)
def test_nothing_is_said_of_the_names_and_shapes_of_the_probe(path, judge):
    lines = judge(path=path, model=path.stem)[1].splitlines()
    assert not [line for line in lines if line.startswith("not judged")]


def test_a_map_of_names_is_read(judge, tmp_path):
    file = tmp_path / "names.json"
    file.write_text(json.dumps({"layers.*.attn.q_rope": "prefill/block*.turned_q"}))
    names = {f"prefill/layers.{i}.attn.q_rope": f"prefill/block{i}.turned_q" for i in range(2)}

    def change(arrays):
        return {names.get(name, name): 2 * x if "q_rope" in name else x for name, x in arrays.items()}

    code, out, _ = judge(change, "--map", str(file), is_trace=False)
    assert code == 1
    assert "prefill/layers.0.attn.q_rope" in out
    file.write_text(json.dumps({"layers.*.attn.q_rop": "prefill/block*.turned_q"}))
    assert "'layers.*.attn.q_rop' is not the name of a step" in judge(change, "--map", str(file))[2]
    file.write_text(json.dumps({"layers.*.attn.q_rope": "block*.q"}))
    assert "'block*.q' is not in " in judge(change, "--map", str(file))[2]
    assert "expected hf, llama.cpp, megatron, vllm, mlx, or a JSON file" in judge(change, "--map", "qt")[2]


def test_names_of_an_engine_hint_at_map(judge):
    def change(arrays):
        return {"model.layers.0.self_attn.o_proj.output": arrays["prefill/layers.0.attn.out"]}

    code, _, err = judge(change, is_trace=False)
    assert code == 2
    assert "it has no arrays with names such as prefill/layers.0.attn.q_rope, but 'model.layers" in err
    assert "add --map hf" in err

    def add(arrays):
        arrays["blk.0.attn_q.output"] = arrays["prefill/layers.0.attn.q"]

    assert "; if these are the engine's own names, add --map llama.cpp\n" in judge(add, is_trace=False)[1]


# --- experts --------------------------------------------------------------------------------------------


def test_experts_that_no_token_chose_are_named(judge):
    """The recording has one token, for which two experts are chosen."""

    def first_token(arrays):
        tokens = ("tokens", "positions", "embed", "norm", "router", "out", "residual", "context", "logits")
        found = {
            name: x[:1] for name, x in arrays.items() if name.startswith("prefill/") and name.endswith(tokens)
        }
        heads = ("attn.q", "attn.k", "attn.v", "q_rope", "k_rope", "cache")
        return found | {name: x[:, :1].copy() for name, x in arrays.items()
                        if name.startswith("prefill/") and name.endswith(heads)}  # fmt: skip

    code, out, _ = judge(first_token, path=PROBED / "mixtral.safetensors", model="mixtral", is_trace=False)
    assert code == 0, out
    router = read(PROBED / "mixtral.safetensors")[0]["prefill/layers.0.mlp.router"][0]  # [E]
    idle = sorted(np.argsort(-router)[2:].tolist())
    text = "experts that no token chose, so that their weights are not judged: layer 0: "
    assert text + ", ".join(map(str, idle)) + "; layer 1: " in out


# --- the table ------------------------------------------------------------------------------------------


def test_the_table_has_only_columns_with_content(judge):
    lines = judge()[1].splitlines()
    assert lines[2].split("  ")[0] == "step"
    assert " ".join(lines[2].split()) == "step error allowed share of allowed largest at"
    assert not any("rank" in line for line in lines[3:-1])
    lines = judge(noisy("prefill/layers.0.attn.q", 0.1))[1].splitlines()
    assert " ".join(lines[2].split()) == "step error allowed share of allowed"
    assert lines[3].endswith(" > 1000 times")


def test_the_wrong_steps_are_in_the_order_of_the_pass(judge):
    def change(arrays):
        for step, size in (("attn.q", 1e-4), ("attn.k", 1e-2), ("mlp.up", 1e-3)):
            noisy(f"prefill/layers.0.{step}", size)(arrays)

    names = [line.split()[0] for line in judge(change)[1].splitlines() if line.startswith("prefill/")]
    assert names.index("prefill/layers.0.attn.q") < names.index("prefill/layers.0.attn.k")
    assert names.index("prefill/layers.0.attn.k") < names.index("prefill/layers.0.mlp.up")


def test_the_largest_error_of_the_hidden_layers_is_said(judge):
    out = judge()[1]
    share = int(out.partition("2 layers: at most ")[2].partition("% of the error allowed")[0])
    rows = [line for line in judge(lambda arrays: arrays, "-v")[1].splitlines() if line.startswith("layer ")]
    assert share == max(int(row.split("%")[0].split()[-1]) for row in rows)


# --- hints and refusals ---------------------------------------------------------------------------------


def test_interleaved_heads_of_a_dump_hint_at_rope(judge):
    def change(arrays):
        return {name: interleaved(x) if name.endswith((".q", ".k", "q_rope", "k_rope", "k_cache")) else x
                for name, x in arrays.items()}  # fmt: skip

    assert judge(change, is_trace=False)[1].endswith(
        "; if your engine does so by design, add --rope interleaved\n"
    )
    out = judge(path=FAULTY / "rope-in-pairs.safetensors")[1]
    assert out.endswith("the other RoPE layout\n"), "the probe's models have the layout of transformers"


def test_a_wrong_residual_hints_at_the_input_of_the_norm(judge):
    def change(arrays):
        arrays["prefill/layers.0.attn.residual"] = arrays["prefill/layers.0.attn.out"]

    assert judge(change)[1].endswith(
        "the stream is left out; attn.residual is recorded as the input of the next norm, which may read "
        "another array\n"
    )
    assert judge(change, is_trace=False)[1].endswith("the stream is left out\n")


def test_a_recording_without_a_path_of_the_model_needs_one(tmp_path, capsys):
    arrays, metadata = read(LLAMA)
    for name, words in (
        ("model", "it does not say where the checkpoint is; give --model"),
        ("/gone/llama", "it is of the model '/gone/llama', which cannot be opened; give --model"),
    ):
        save_file(arrays, tmp_path / "e.safetensors", metadata | {"model": name})
        assert main(["judge", str(tmp_path / "e.safetensors")]) == 2
        assert words in capsys.readouterr().err


def test_a_recording_of_more_layers_than_the_model_has_is_refused(judge):
    def change(arrays):
        return arrays | {
            name.replace("layers.1", "layers.2"): x for name, x in arrays.items() if "layers.1" in name
        }

    code, _, err = judge(change, is_trace=False)
    assert code == 2
    assert "it has arrays of 3 layers, and " in err
    assert "--layers" not in err


def test_all_fields_that_differ_are_named(tmp_path, capsys):
    arrays, metadata = read(LLAMA)
    config = json.loads(metadata["config"]) | {"rms_norm_eps": 0.5, "intermediate_size": 60, "head_dim": 4}
    save_file(arrays, tmp_path / "e.safetensors", metadata | {"config": json.dumps(config)})
    assert main(["judge", str(tmp_path / "e.safetensors"), "--model", str(GOLDENS / "llama2")]) == 2
    err = capsys.readouterr().err
    assert "the engine's config has intermediate_size 60, and that of " in err
    assert "; head_dim 4, not 6; rms_norm_eps 0.5, not 1e-05: it runs another model, or reads" in err


def test_an_npy_file_and_missing_tokens_are_said_plainly(judge, tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.zeros(3))
    assert main(["judge", str(tmp_path / "x.npy"), "--model", "smollm2"]) == 2
    assert "an .npy file has one array without a name" in capsys.readouterr().err

    def change(arrays):
        return {name: x for name, x in arrays.items() if not name.endswith("tokens")}

    assert (
        "it lacks prefill/tokens, the 6 token ids of its passes; save them, or give"
        in judge(change, is_trace=False)[2]
    )
