"""The command `minitp lint`: its table, verdict, options and exit codes."""

import json

import engine_shards as engines
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny import UNEVEN, write_tiny

from minitp.cli.main import main
from minitp.loading.export import FORMAT


@pytest.fixture
def lint(capsys):
    """A function that runs `minitp lint` and returns (exit code, stdout, stderr)."""

    def lint(*argv):
        code = main(["lint", *map(str, argv)])
        return code, *capsys.readouterr()

    return lint


@pytest.mark.parametrize("tp", [1, 2, 4, 9])
@pytest.mark.parametrize("fields", [{}, {"intermediate_size": 3, "vocab_size": 3}])
def test_the_shards_of_minitp_are_right(tp, fields, lint, tmp_path):
    """Read the model and the layers from plan.json; some ranks have no columns or no rows."""
    write_tiny(tmp_path / "model", tokenizer=False, **UNEVEN | fields)
    shards = tmp_path / "shards"
    argv = ["--model", str(tmp_path / "model"), "--tp", str(tp), "--layers", "1", "-o", str(shards)]
    assert main(["shard", *argv]) == 0
    code, out, _ = lint(shards)
    assert code == 0
    assert "each once" in out
    assert out.splitlines()[-1].startswith(f"all right: 12 tensors on {tp} rank")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("split", [3, 1], "split: expected str, found list"),
        ("split", "auto", "--split auto depends on devices"),
        ("layers", "1", "layers: expected int, found str"),
        ("model", 3, "model: expected str, found int"),
    ],
)
def test_a_plan_with_a_wrong_field(field, value, words, tiny, refused, tmp_path):
    fields = {"format": FORMAT, "model": str(tiny), "layers": 1, "split": "3,1"}
    (tmp_path / "plan.json").write_text(json.dumps({**fields, field: value}))
    for rank in range(2):
        save_file({"model.norm.weight": np.ones(1, np.float32)}, tmp_path / f"rank{rank}.safetensors")
    assert words in refused("lint", tmp_path)


def test_shards_of_unequal_ranks_are_right_with_their_shares(lint, tmp_path):
    """The ranks have ragged groups: 7 query heads on 3 KV heads, and 5 on 2."""
    write_tiny(tmp_path / "model", tokenizer=False, **UNEVEN)
    for split in ("3,1", "2,3,1"):
        shards = tmp_path / split
        assert main(["shard", "--model", str(tmp_path / "model"), "--split", split, "-o", str(shards)]) == 0
        assert lint(shards)[0] == 0, "plan.json has the shares"
        (shards / "plan.json").unlink()
        argv = (shards, "--model", tmp_path / "model")
        assert lint(*argv, "--split", split)[0] == 0
    assert lint(*argv)[0] == 1, "equal shares would give the second rank three query heads"
    code, _, err = lint(*argv, "--split", "3,1")
    assert (code, err) == (2, "minitp: --split '3,1' has 2 shares, but there are files of 3 ranks\n")
    code, _, err = lint(*argv, "--split", "auto")
    assert (code, "give numbers" in err) == (2, True)


def test_layers_that_are_alike_share_a_row(lint, models, tmp_path):
    model = models["uneven"]
    ranks = engines.of_engine("vllm", model, 4)
    ranks[1]["model.layers.1.input_layernorm.weight"] += 1
    shards = engines.write(tmp_path, ranks)
    code, out, _ = lint(shards, "--model", model.source.directory)
    table = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 1
    assert table[0] == f"{tmp_path}: 4 ranks, names of vllm, compared with {model.source.directory}"
    assert table[3] == "model.layers.1.input_layernorm.weight elements 0:20 wrong", "the wrong ones first"
    start = table.index(
        "model.layers.*.self_attn.qkv_proj.weight x 2 q rows 0:18 | 18:30 | 30:42 | 42:54 each once"
    )
    assert table[start + 1] == "k rows 0:6 | 6:12 | 6:18 | 12:18 with their query heads"
    assert (
        "model.layers.*.mlp.gate_up_proj.weight x 2 gate rows 0:10 | 10:19 | 19:28 | 28:37 each once" in table
    )
    fault = "model.layers.1.input_layernorm.weight: rank 1 has the expected values plus 1"
    assert f"wrong: {fault}" in table
    assert table[-1] == f"first wrong tensor: {fault}"
    code, out, _ = lint(shards, "--model", model.source.directory, "-v")
    assert "model.layers.0.self_attn.qkv_proj.weight" in out
    assert "*" not in out


def test_faults_of_several_layers_share_a_line(lint, models, tmp_path):
    model = models["llama"]
    ranks = engines.of_engine("hf", model, 2)
    for held in ranks:
        held["lm_head.weight"] = np.zeros_like(held["lm_head.weight"])
        for name in [name for name in held if "up_proj" in name]:
            del held[name]
    code, out, _ = lint(engines.write(tmp_path, ranks), "--model", model.source.directory)
    assert code == 1
    assert "wrong: model.layers.*.mlp.up_proj.weight x 2: is in no rank's file" in out
    assert out.endswith(
        "3 tensors are wrong; first wrong tensor: model.layers.0.mlp.up_proj.weight: is in no rank's file\n"
    )


def test_the_shards_of_another_model_are_named_as_such(lint, models, tmp_path):
    ranks = engines.of_engine("hf", models["llama"], 2)
    ranks = [{name: x + 3 + x * x for name, x in held.items()} for held in ranks]
    code, out, _ = lint(engines.write(tmp_path, ranks), "--model", models["llama"].source.directory)
    assert code == 1
    assert "note: most values are not those of the checkpoint; is it the one that was sharded?" in out


def test_an_engine_may_be_given(lint, models, tmp_path):
    """Shards of GGUF's names have the rows of query and key heads in the interleaved order."""
    model = models["llama"]
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k"}
    ranks = engines.of_engine("hf", model, 2)
    short = {
        name.replace("model.layers", "blk").replace(old, new): (name, new)
        for old, new in names.items()
        for name in ranks[0]
        if old in name
    }
    ranks = [{new: held[old] for new, (old, _) in short.items()} for held in ranks]
    _, out, _ = lint(
        engines.write(tmp_path, ranks), "--model", model.source.directory, "--engine", "llama.cpp"
    )
    assert "are half-split, expected interleaved: the other RoPE layout" in out
    _, out, _ = lint(tmp_path, "--model", model.source.directory, "--engine", "hf")
    assert "4 tensors found by content" in out
    assert "RoPE" not in out


def test_without_a_model_the_way_out_is_named(lint, models, tmp_path):
    engines.write(tmp_path, engines.of_engine("hf", models["llama"], 2))
    code, _, err = lint(tmp_path)
    assert code == 2
    assert err == f"minitp: {tmp_path}: needs --model, the checkpoint that was sharded\n"
