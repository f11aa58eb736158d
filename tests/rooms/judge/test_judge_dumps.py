"""The judgement of arrays that another program saved without metadata, in its own layouts."""

import numpy as np
import pytest
from paths import GOLDENS, PROBED, SUPPORT
from safetensors import safe_open
from safetensors.numpy import save_file

from minitp.cli.main import main
from minitp.compare.heads import interleaved
from minitp.trace.names import INTEGERS

PROMPT = [3, 50, 7, 7, 91]


def arrays_of(path):
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture
def judge(tmp_path, capsys):
    """A function that judges arrays in a file, and returns the exit code, the output and the errors."""

    def judge(arrays, *options, golden="llama2", name="engine.npz"):
        path = tmp_path / name
        np.savez(path, **arrays) if path.suffix == ".npz" else save_file(arrays, path)
        code = main(["judge", str(path), "--model", str(GOLDENS / golden), *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return judge


def in_other_layouts(arrays):
    """Return arrays as engines save them: tokens first, heads joined, a batch of one, flat."""
    found = {}
    for name, array in arrays.items():
        if name.endswith(INTEGERS):
            found[name] = array[None]  # [1, T]
        elif name.endswith((".q", ".k", ".v")):
            found[name] = array.transpose(1, 0, 2).reshape(array.shape[1], -1)  # [T, n*d]
        elif name.endswith("rope"):
            found[name] = array.transpose(1, 0, 2)[None]  # [1, T, n, d]
        elif name.endswith("cache"):
            found[name] = array.reshape(-1)  # [K*S*d]
        else:
            found[name] = array[None]  # [1, T, D], [1, H, T, S]
    return found


@pytest.mark.parametrize("name", ["llama2", "qwen3", "gemma3", "mixtral", "phi3", "smollm3"])
def test_nothing_is_blamed_in_other_layouts(name, judge):
    code, out, _ = judge(in_other_layouts(arrays_of(PROBED / f"{name}.safetensors")), golden=name)
    assert code == 0
    assert "arrays without metadata, float32, 6 tokens in 2 passes" in out


@pytest.mark.parametrize("name", ["rope-in-pairs", "tiled-heads", "gate-is-up", "eps"])
def test_a_fault_is_blamed_as_in_a_recording(name, judge, capsys):
    path = SUPPORT / "faulty_recordings" / f"{name}.safetensors"
    assert main(["judge", str(path), "--model", str(GOLDENS / "llama2")]) == 1
    expected = capsys.readouterr().out.splitlines()[-2:]
    code, out, _ = judge(in_other_layouts(arrays_of(path)))
    assert code == 1
    hint = "; if your engine does so by design, add --rope interleaved" if name == "rope-in-pairs" else ""
    assert out.splitlines()[-2:] == [expected[0], expected[1] + hint]


def test_only_needed_arrays_under_short_names(judge):
    """Names without a pass are those of `prefill`; a cache stands for its keys, and keys for a cache."""
    needed = ("q_rope", "k_cache", "attn.v")
    arrays = arrays_of(PROBED / "llama2.safetensors")
    arrays = {name.removeprefix("prefill/"): array for name, array in arrays.items()
              if name.startswith("prefill/") and name.endswith(needed)}  # fmt: skip
    code, out, _ = judge(arrays, "--tokens", ",".join(map(str, PROMPT)), name="engine.safetensors")
    assert code == 0
    assert "(8 arrays on 1 rank)" in out  # q_rope, k_rope, k_cache and v of two layers
    assert "attn.v_cache" in out.partition("not recorded: ")[2]


@pytest.mark.parametrize("name", ["llama2", "gemma3", "smollm3", "mixtral", "granite"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_any_other_step_may_be_missing(name, seed, judge):
    rng, arrays = np.random.default_rng(seed), arrays_of(PROBED / f"{name}.safetensors")
    needed = ("tokens", "attn.v", "mlp.router")
    arrays = {name: array for name, array in arrays.items() if name.endswith(needed) or rng.random() < 0.5}
    code, out, _ = judge(arrays, golden=name)
    assert code == 0, out


def test_logits_of_the_last_token_and_norms_of_all(judge):
    arrays = arrays_of(PROBED / "llama2.safetensors")
    arrays["prefill/logits"] = arrays["prefill/logits"][-1]  # [V]
    code, out, _ = judge(arrays)
    assert code == 0
    assert "prefill/logits" in out or "logits " in out


def test_the_first_layers_alone(judge):
    arrays = arrays_of(PROBED / "llama2.safetensors")
    code, out, _ = judge({name: array for name, array in arrays.items() if "layers.1" not in name})
    assert code == 0
    assert "only the first 1 layer of the model: final_norm and logits are not judged" in out
    assert "final_norm" not in out.partition("not recorded")[0]


def test_interleaved_heads_are_converted(judge):
    arrays = arrays_of(PROBED / "llama2.safetensors")
    for name, array in arrays.items():
        if name.endswith((".q", ".k", "q_rope", "k_rope", "k_cache")):
            arrays[name] = interleaved(array)
    assert judge(arrays, "--rope", "interleaved")[0] == 0
    code, out, _ = judge(arrays)
    assert code == 1
    assert "first wrong operation: prefill/layers.0.attn.q, " in out
    assert "interleaved, not half-split" in out


MODULES = {  # paths in transformers -> steps of the same module
    "embed_tokens.output": "embed",
    "layers.{i}.input_layernorm.output": "attn.norm",
    "layers.{i}.self_attn.q_proj.output": "attn.q",
    "layers.{i}.self_attn.k_proj.output": "attn.k",
    "layers.{i}.self_attn.v_proj.output": "attn.v",
    "layers.{i}.self_attn.o_proj.input": "attn.context",
    "layers.{i}.self_attn.o_proj.output": "attn.out",
    "layers.{i}.mlp.down_proj.input": "mlp.act",
    "layers.{i}": "mlp.residual",
}


def test_the_outputs_of_modules_under_their_own_names(judge, capsys):
    """Hooks see no rotated queries and no cache, so the context is judged from q, k and v."""
    steps = in_other_layouts(arrays_of(SUPPORT / "faulty_recordings" / "tiled-heads.safetensors"))
    arrays = {}
    for path, step in MODULES.items():
        for i in range(2):
            name = f"prefill/layers.{i}.{step}" if "{i}" in path else f"prefill/{step}"
            arrays["model." + path.format(i=i)] = steps[name]
    tokens = ["--tokens", ",".join(map(str, PROMPT))]
    code, out, _ = judge(arrays, "--map", "hf", *tokens)
    assert code == 1
    assert "first wrong operation: prefill/layers.0.attn.context, " in out
    assert "the KV heads are tiled (h mod K)" in out
    assert "--map 'qt': expected hf, " in judge(arrays, "--map", "qt", *tokens)[2]
    assert main(["judge", "x.npz", "--map", "hf"]) == 2
    assert "--map hf needs the model's config; give --model" in capsys.readouterr().err


def test_arrays_in_float64_of_an_engine_in_float32(judge):
    arrays = {
        name: array.astype(np.float64) for name, array in arrays_of(PROBED / "llama2.safetensors").items()
    }
    assert judge(arrays)[0] == 0
    code, out, _ = judge(arrays, "--dtype", "float32")
    assert code == 0
    assert "arrays without metadata, float32" in out


def test_arrays_in_float32_of_an_engine_in_bfloat16(judge):
    arrays = {
        name: array.astype(np.float32) for name, array in arrays_of(PROBED / "tinyllama.safetensors").items()
    }
    code, out, _ = judge(arrays, golden="tinyllama")
    assert code == 0
    assert "arrays without metadata, bfloat16" in out
    assert judge(arrays, "--dtype", "float32", golden="tinyllama")[0] == 1


def test_a_folder_of_the_ranks_arrays(tmp_path, capsys):
    for rank in (0, 1):
        arrays = arrays_of(SUPPORT / "rank_recordings" / "kv-of-rank-0" / f"rank{rank}.safetensors")
        np.savez(tmp_path / f"rank{rank}.npz", **in_other_layouts(arrays))
    assert main(["judge", str(tmp_path), "--model", str(GOLDENS / "llama2")]) == 1
    out = capsys.readouterr().out
    assert "first wrong operation: prefill/layers.1.attn.k, layer 1, rank 1: " in out
    assert "the rows of the weight are those of rank 0" in out


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (
            lambda arrays: arrays.pop("prefill/tokens"),
            [],
            "its arrays named tokens have 1; give the ids of all",
        ),
        (lambda arrays: None, ["--tokens", "1,2"], "its passes have 6 tokens, and --tokens has 2"),
        (
            lambda arrays: arrays.update({"warmup/embed": arrays["prefill/embed"]}),
            [],
            "the pass 'warmup': expected prefill, prefill.1, .. or decode.1",
        ),
        (
            lambda arrays: [arrays.pop(name) for name in list(arrays) if name != "prefill/tokens"],
            [],
            "it has no arrays with names such as prefill/layers.0.attn.q_rope",
        ),
    ],
)
def test_what_cannot_be_judged_is_refused(change, options, words, judge):
    arrays = arrays_of(PROBED / "llama2.safetensors")
    change(arrays)
    code, out, err = judge(arrays, *options)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_arrays_without_metadata_need_a_model(tmp_path, capsys):
    np.savez(tmp_path / "engine.npz", **arrays_of(PROBED / "llama2.safetensors"))
    assert main(["judge", str(tmp_path / "engine.npz")]) == 2
    assert "does not say which model it is of; give --model" in capsys.readouterr().err
