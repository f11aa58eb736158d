"""`minitp shard`: its files, put together, are the checkpoint, and its table describes them."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import CONFIG, random_tensors, write_tiny

from minitp.cli.main import main
from minitp.loading.random_weights import RandomWeights
from minitp.loading.safetensors_writer import TensorWriter

UNEVEN = {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 41}
MODELS = {
    "uneven": UNEVEN,
    "one KV head": {"hidden_size": 28, "num_attention_heads": 7, "num_key_value_heads": 1},
    "no grouping": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "tied": UNEVEN | {"tie_word_embeddings": True},
    "biases": UNEVEN | {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10},
    "fewer columns than ranks": {"intermediate_size": 3},
    "fewer tokens than ranks": {"vocab_size": 3, "tie_word_embeddings": True},
}
ONE_FILE, SEVERAL_FILES = "one file", "several files"


def shard(*argv):
    return main(["shard", *map(str, argv)])


def write_model(directory, dtypes, layout=ONE_FILE, **fields):
    """Write a tiny model with tensors of `dtypes` in turn, in one file or three; return its tensors."""
    write_tiny(directory, tokenizer=False, **fields)
    tensors = {}
    for i, (name, values) in enumerate(random_tensors({**CONFIG, **fields}).items()):
        tensors[name] = values.astype(dtypes[i % len(dtypes)])
    if layout == ONE_FILE:
        save_file(tensors, directory / "model.safetensors")
        return tensors
    (directory / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def put_together(directory):
    """Return the checkpoint, built from only plan.json and the ranks' files, as another engine would."""
    plan = json.loads((directory / "plan.json").read_text())
    assert plan["format"] == "minitp-shards-1"
    ranks = [load_file(directory / f"rank{r}.safetensors") for r in range(plan["tp"])]
    for rank in ranks:
        assert set(rank) == set(plan["tensors"])
    whole = {}
    for name, entry in plan["tensors"].items():
        parts = [rank[name] for rank in ranks]
        if entry["axis"] is None:
            assert all(part.tobytes() == parts[0].tobytes() for part in parts)
            whole[name] = parts[0]
            continue
        array = np.zeros(entry["shape"], parts[0].dtype)
        filled = np.zeros(entry["shape"], bool)
        for part, (start, stop) in zip(parts, entry["ranges"], strict=True):
            place = (slice(None),) * entry["axis"] + (slice(start, stop),)
            assert part.shape == array[place].shape, "even of an empty part"
            twice = filled[place]
            assert array[place][twice].tobytes() == part[twice].tobytes()
            array[place], filled[place] = part, True
        assert filled.all()
        whole[name] = array
    return whole


def same(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


DTYPES = {"float32": [np.float32], "bfloat16": [ml_dtypes.bfloat16], "mixed": [np.float32, np.float16]}


@pytest.mark.parametrize("layout", [ONE_FILE, SEVERAL_FILES])
@pytest.mark.parametrize("model", MODELS)
def test_put_together_it_is_the_checkpoint(tmp_path, model, layout):
    fields = MODELS[model]
    heads = fields.get("num_attention_heads", CONFIG["num_attention_heads"])
    for dtypes in DTYPES.values() if model == "uneven" else [DTYPES["bfloat16"]]:
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        tensors = write_model(tmp_path / "model", dtypes, layout, **fields)
        for tp in range(1, heads + 1):
            out = tmp_path / f"{dtypes[0].__name__}-{len(dtypes)}-{tp}"
            assert shard("--model", tmp_path / "model", "--tp", tp, "-o", out) == 0
            same(put_together(out), tensors)
            names = ["plan.json", *[f"rank{r}.safetensors" for r in range(tp)]]
            assert sorted(os.listdir(out)) == sorted(names)
    assert shard("--model", tmp_path / "model", "--split", "3,1", "-o", tmp_path / "unequal") == 0
    same(put_together(tmp_path / "unequal"), tensors)
    assert json.loads((tmp_path / "unequal/plan.json").read_text())["split"] == "3,1"
    assert shard("--model", tmp_path / "model", "--split", "auto", "--tp", 2) == 2, "no devices to measure"


def test_plan_json_says_what_else_there_is_to_know(tmp_path):
    write_model(tmp_path / "model", [np.float16], **MODELS["tied"])
    assert shard("--model", tmp_path / "model", "--tp", 4, "-o", tmp_path / "out", "--layers", 1) == 0
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["config"] == json.loads((tmp_path / "model" / "config.json").read_text())
    assert (plan["tp"], plan["layers"]) == (4, 1)
    assert plan["model"] == str(tmp_path / "model")
    assert plan["head_ranges"] == [[0, 3], [3, 5], [5, 7], [7, 9]]
    assert plan["kv_head_ranges"] == [[0, 1], [1, 2], [1, 3], [2, 3]]
    assert plan["ffn_ranges"][0] == [0, 11]
    assert plan["vocab_ranges"][-1] == [194, 258]
    assert not [name for name in plan["tensors"] if name.startswith("model.layers.1.")]
    assert plan["tensors"]["model.layers.0.self_attn.k_proj.weight"] == {
        "dtype": "F16",
        "shape": [12, 36],
        "axis": 0,
        "ranges": [[0, 4], [4, 8], [4, 12], [8, 12]],
    }


def test_random_model(tmp_path, capsys):
    """The weights of a random model are written in float32, in which they are generated."""
    argv = ["--model", "random:smollm2-135m", "--layers", 1, "--tp", 5]
    assert shard(*argv, "-o", tmp_path / "deep" / "out") == 0
    found = put_together(tmp_path / "deep" / "out")
    drawn = RandomWeights({name: array.shape for name, array in found.items()})
    same(found, {n: drawn.read(n, tuple(slice(0, m) for m in a.shape)) for n, a in found.items()})
    assert len(found) == 11
    written = capsys.readouterr().out
    assert "float32" in written
    assert shard(*argv) == 0
    assert written.startswith(capsys.readouterr().out.rstrip("\n")), "with or without files the same table"


# --- the table ------------------------------------------------------------------------------------------


def table(capsys, *argv):
    """Return the printed text, and the ranks' lines as lists of words."""
    assert shard(*argv) == 0
    text = capsys.readouterr().out
    ranks = text[text.index("rank  heads") :].splitlines()[1:]
    return text, [line.split() for line in ranks[: ranks.index("") if "" in ranks else None]]


def joined(text):
    """Return a text without its line breaks."""
    return " ".join(text.split())


def test_table_of_uneven_heads(tmp_path, capsys):
    tensors = write_model(tmp_path / "model", [np.float16], **MODELS["tied"])
    text, ranks = table(capsys, "--model", tmp_path / "model", "--tp", 4)
    assert "2 layers, hidden size 36, 9 query heads and 3 KV heads of 4 dimensions" in joined(text)
    assert "over 4 ranks" in text
    assert [row[:7] for row in ranks[:-1]] == [
        ["0", "0:3", "0:12", "0:1", "0:4", "0:11", "0:65"],
        ["1", "3:5", "12:20", "1:2*", "4:8", "11:21", "65:130"],
        ["2", "5:7", "20:28", "1:3*", "4:12", "21:31", "130:194"],
        ["3", "7:9", "28:36", "2:3*", "8:12", "31:41", "194:258"],
    ]
    assert "head 1 is on ranks 1 and 2, head 2 is on ranks 2 and 3." in joined(text)
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert lines["model.layers.*."] == ["x", "2"]
    assert lines["self_attn.q_proj.weight"] == ["[36,", "36]", "0", "Hd", "F16", "5.2", "kB"]
    assert lines["self_attn.o_proj.weight"][2:4] == ["1", "Hd"]
    assert lines["self_attn.k_proj.weight"][2:4] == ["0", "Kd"]
    assert lines["mlp.down_proj.weight"][2:4] == ["1", "F"]
    assert lines["input_layernorm.weight"] == ["[36]", "-", "F16", "144", "B"]
    assert lines["model.embed_tokens.weight"][2:4] == ["0", "V"]
    assert "lm_head.weight: tied" in text
    assert lines["total"] == size_of(sum(array.nbytes for array in tensors.values()))


def size_of(nbytes):
    return [f"{nbytes / 1e3:.1f}", "kB"] if nbytes >= 1000 else [str(nbytes), "B"]


HIDDEN = {"uneven": 36, "no grouping": 32}


@pytest.mark.parametrize("model", HIDDEN)
def test_bytes_are_those_of_the_files(tmp_path, capsys, model):
    tensors = write_model(tmp_path / "model", [np.float32, np.float16], **MODELS[model])
    for tp in (1, 3, 4):
        out = tmp_path / str(tp)
        text, ranks = table(capsys, "--model", tmp_path / "model", "--tp", tp, "-o", out)
        held = [sum(a.nbytes for a in load_file(out / f"rank{r}.safetensors").values()) for r in range(tp)]
        assert [row[-2:] for row in ranks[:tp]] == [size_of(n) for n in held]
        assert ranks[tp] == ["all", *size_of(sum(held))]
        more = sum(held) - sum(array.nbytes for array in tensors.values())
        assert (f"hold {' '.join(size_of(more))} (" in joined(text)) == (more > 0) == (tp > 1)
        norms = (tp - 1) * sum(a.nbytes for a in tensors.values() if a.ndim == 1 and len(a) == HIDDEN[model])
        assert (f"{' '.join(size_of(norms))} for tensors that are whole" in joined(text)) == (tp > 1)
        marks = [row[3] for row in ranks[:tp] if "*" in row[3]]
        assert bool(marks) == (model != "no grouping" and tp == 4)


def test_layers_that_differ_are_not_one_line(tmp_path, capsys):
    tensors = write_model(tmp_path / "model", [np.float16], num_hidden_layers=3)
    name = "model.layers.1.input_layernorm.weight"
    save_file({**tensors, name: tensors[name].astype(np.float32)}, tmp_path / "model" / "model.safetensors")
    text, _ = table(capsys, "--model", tmp_path / "model")
    assert re.search(r"^model\.layers\.0,2\. +x 2$", text, re.MULTILINE)
    assert re.search(r"^model\.layers\.1\. +x 1$", text, re.MULTILINE)


@pytest.mark.parametrize("model", ["llama-3-8b", "mistral-7b", "smollm2-135m"])
def test_table_fits_a_terminal(capsys, model):
    for tp in (1, 2, 4, 9):
        text, _ = table(capsys, "--model", f"random:{model}", "--tp", tp)
        assert max(map(len, text.splitlines())) <= 80
    if model != "smollm2-135m":
        text, ranks = table(capsys, "--model", f"random:{model}", "--tp", 32)
        assert max(map(len, text.splitlines())) <= 80
        assert len(ranks) == 33
        assert "head 7 is on ranks 28 to 31." in joined(text)


# --- what is rejected -----------------------------------------------------------------------------------


@pytest.fixture
def refused(capsys):
    """Run the command; it must end with one line on stderr, which is returned."""

    def run(*argv, code=2):
        assert shard(*argv) == code
        captured = capsys.readouterr()
        assert captured.err.startswith("minitp: ")
        assert captured.err.count("\n") == 1, captured.err
        assert code == 3 or captured.out == ""
        return captured.err

    return run


def test_directories_that_cannot_be_written(refused, tiny, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    assert f"-o {file}: cannot create this directory: File exists" in refused("--model", tiny, "-o", file)
    assert "cannot create this directory" in refused("--model", tiny, "-o", file / "deeper")
    assert "-o /proc/shards: cannot create this directory" in refused("--model", tiny, "-o", "/proc/shards")
    monkeypatch.setattr(os, "access", lambda path, mode, **_: False)  # root may write everywhere
    assert "no permission to write there" in refused("--model", tiny, "-o", tmp_path)


def test_too_little_room(refused, tiny, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "but only 0.00 GB is free" in refused("--model", tiny, "-o", tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


def test_files_of_more_ranks(refused, tiny, tmp_path, capsys):
    assert shard("--model", tiny, "--tp", 4, "-o", tmp_path) == 0
    assert shard("--model", tiny, "--tp", 4, "-o", tmp_path) == 0, "the same again is fine"
    capsys.readouterr()
    line = refused("--model", tiny, "--tp", 2, "-o", tmp_path)
    assert f"{tmp_path / 'rank2.safetensors'} belongs to a plan for more than 2 ranks" in line


def test_no_such_split(refused, tiny, tmp_path):
    assert "--tp 5: this model has 4 attention heads" in refused("--model", tiny, "--tp", 5)
    assert "--tp many: expected a number" in refused("--model", tiny, "--tp", "many")
    assert "--layers 3" in refused("--model", tiny, "--layers", 3, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "no such directory" in refused("--model", tmp_path / "missing")


def test_tied_embeddings_next_to_another_lm_head(refused, tmp_path, capsys):
    tensors = write_model(tmp_path / "model", [np.float16], **MODELS["tied"])
    embed = tensors["model.embed_tokens.weight"]
    path = tmp_path / "model" / "model.safetensors"
    save_file({**tensors, "lm_head.weight": embed}, path)
    assert shard("--model", tmp_path / "model", "-o", tmp_path / "out") == 0
    same(put_together(tmp_path / "out"), tensors)
    capsys.readouterr()
    other = embed.copy()
    other[-1, -1] += 1
    for lm_head in (other, embed[1:]):
        save_file({**tensors, "lm_head.weight": lm_head}, path)
        line = refused("--model", tmp_path / "model", "-o", tmp_path / "new")
        assert "lm_head.weight differs from model.embed_tokens.weight" in line
        assert not (tmp_path / "new").exists()


# --- runs that break off --------------------------------------------------------------------------------


def test_a_broken_run_leaves_no_half_file(tiny, tmp_path, monkeypatch):
    """A plan.json of an earlier run is not left next to files of this run."""
    assert shard("--model", tiny, "--tp", 2, "-o", tmp_path) == 0
    write, count = TensorWriter.write, 0

    def break_off(self, name, array):
        nonlocal count
        count += 1
        if count == 30:  # in the second of the ranks' 21 tensors each
            raise KeyboardInterrupt
        write(self, name, array)

    monkeypatch.setattr(TensorWriter, "write", break_off)
    assert shard("--model", tiny, "--tp", 2, "-o", tmp_path) == 130
    assert sorted(os.listdir(tmp_path)) == ["rank0.safetensors", "rank1.safetensors"]
    for rank in range(2):
        assert len(load_file(tmp_path / f"rank{rank}.safetensors")) == 21


def test_full_disk_is_reported(tiny, tmp_path):
    """A limit on the size of files has the same effect: writing fails in the middle of a file."""
    done = subprocess.run(
        [sys.executable, "-m", "minitp", "shard", "--model", tiny, "--tp", "2", "-o", tmp_path / "out"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 3
    assert done.stderr == f"minitp: {tmp_path / 'out'}: cannot be written: File too large\n"
    assert os.listdir(tmp_path / "out") == []
