"""Tests of GGUF files: whole tensors, a rank's slices, the config, and rejected files."""

import json
import shutil
import struct
import sys

import gguf
import numpy as np
import pytest
from gguf_files import gguf_name, write_gguf
from safetensors.numpy import load_file

from minitp import LLM
from minitp.cli.main import main
from minitp.cli.serve import served_name
from minitp.errors import InputError
from minitp.loading.demo import cache_directory, fetch_gguf
from minitp.loading.gguf.model import GgufModel
from minitp.loading.source import open_config, open_model
from minitp.oracle import Oracle
from minitp.oracle.gguf import gguf_tensor
from minitp.shard import make_plan

KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"]
TP = 3  # FFN columns 0:171, 171:342, 342:512, which cut blocks of 32 or 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def plain_file(folder):
    """A GGUF file in float32, which has exactly the weights of the directory that it is made from."""
    return write_gguf(folder / "plain.gguf")


def halves(weight, heads):
    """Reorder the rows of q or k from pairs to halves: the even rows of a head, then the odd rows."""
    per_head = np.split(weight, heads)
    return np.concatenate([rows[parity::2] for rows in per_head for parity in (0, 1)])


# --- weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_slice_equals_that_of_the_dequantized_tensor(folder, kind):
    """Compare bit by bit: both come from the same blocks through the same library."""
    path = write_gguf(folder / f"{kind}.gguf", kind)
    source, oracle_tensor = open_model(str(path), TP), gguf_tensor(path)
    raw = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    kinds = {tensor.tensor_type.name for tensor in raw.values()}
    assert kinds == {"F32", kind}
    for name, shard in source.plan.tensors.items():
        tensor = raw[gguf_name(name)]
        whole = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if "q_proj" in name or "k_proj" in name:
            whole = halves(whole, 4 if "q_proj" in name else 2)
        assert np.isfinite(whole).all()
        assert len(np.unique(whole)) > 10
        assert np.array_equal(oracle_tensor(name), whole)
        for rank in range(TP):
            part = source.tensors.read(name, shard.index(rank))
            assert part.dtype.name == {"F16": "float16", "BF16": "bfloat16"}.get(
                tensor.tensor_type.name, "float32"
            )
            assert np.array_equal(part.astype(np.float32), whole[shard.index(rank)]), (name, rank)


def test_empty_slices(plain_file):
    tensors = GgufModel(plain_file).tensors
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"):
        assert tensors.read(name, (slice(0, 5), slice(7, 7))).shape == (5, 0)
        assert tensors.read(name, (slice(3, 3), slice(0, 40))).shape == (0, 40)


def test_biases_of_q_and_k_are_reordered_too(folder):
    path = write_gguf(folder / "bias.gguf", attention_bias=True, mlp_bias=True)
    model, tensors = GgufModel(path), load_file(folder / "bias" / "model.safetensors")
    assert (model.fields["attention_bias"], model.fields["mlp_bias"]) == (True, True)
    oracle_tensor = gguf_tensor(path)
    for name, weight in tensors.items():
        assert np.array_equal(model.tensors.read(name, tuple(slice(0, n) for n in weight.shape)), weight)
        assert np.array_equal(oracle_tensor(name), weight)
    name = "model.layers.0.self_attn.q_proj.bias"
    assert np.array_equal(model.tensors.read(name, (slice(70, 140),)), tensors[name][70:140])


# --- the model ------------------------------------------------------------------------------------------


def tokens_of(capsys, *argv):
    assert main(["generate", "--json", *map(str, argv)]) == 0
    return json.loads(capsys.readouterr().out)["token_ids"]


@pytest.mark.parametrize("tied", [False, True])
def test_same_tokens_as_the_directory(folder, capsys, tied):
    path = write_gguf(folder / f"tied-{tied}.gguf", tie_word_embeddings=tied, seed=3)
    options = ["--tokens", "5,77,200", "-n", "12", "--tp", "1", "--ignore-eos", "--model"]
    assert tokens_of(capsys, *options, path) == tokens_of(capsys, *options, path.with_suffix(""))
    assert GgufModel(path).fields["tie_word_embeddings"] is tied


def test_config(plain_file):
    expected = open_model(str(plain_file.with_suffix("")), 1).config
    assert open_model(str(plain_file), 1).config == expected
    assert open_config(str(plain_file)) == expected


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K"])
def test_check_passes(folder, capsys, kind):
    path = write_gguf(folder / f"check-{kind}.gguf", kind)
    assert main(["check", "--tokens", "5,77,200", "--tp", "1", "--model", str(path)]) == 0
    assert "all steps within bounds" in capsys.readouterr().out


@pytest.mark.mpi
def test_ranks_as_processes(folder, capfd):
    path = write_gguf(folder / "processes.gguf", "Q4_1")
    assert main(["check", "--tokens", "5,77,200", "--tp", "3", "--model", str(path)]) == 0
    assert "all steps within bounds" in capfd.readouterr().out


def test_oracle_trace(folder, plain_file, capsys):
    out = folder / "oracle.safetensors"
    argv = ["trace", "--tokens", "5,77,200", "--oracle", "-o", str(out), "--model", str(plain_file)]
    assert main(argv) == 0
    expected = Oracle.from_directory(plain_file.with_suffix("")).logits([5, 77, 200])
    assert np.array_equal(load_file(out)["prefill/logits"], expected)


def test_shards_equal_those_of_the_directory(folder, plain_file, capsys):
    for model, name in ((plain_file, "a"), (plain_file.with_suffix(""), "b")):
        assert main(["shard", "--tp", "3", "-o", str(folder / name), "--model", str(model)]) == 0
    assert "counted and written as float32" in capsys.readouterr().out
    for rank in range(3):
        a, b = (load_file(folder / name / f"rank{rank}.safetensors") for name in "ab")
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "float16")]
)
def test_dtype_on_gpus(folder, kind, dtype):
    path = write_gguf(folder / f"dtype-{kind}.gguf", kind)
    assert GgufModel(path).fields["dtype"] == dtype


def test_demo_as_gguf_equals_the_demo(capsys, tmp_path):
    path = cache_directory() / "tests" / "smollm2.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(fetch_gguf(tmp_path), path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    options = ["The capital of France is", "-n", "6", "--tp", "1", "--model"]
    assert tokens_of(capsys, *options, path) == tokens_of(capsys, *options, "smollm2")
    from_file, demo = open_model(str(path), 2), open_model("smollm2", 2)
    messages = [{"role": "user", "content": "Hi"}]
    assert from_file.chat_template().render(messages) == demo.chat_template().render(messages)
    text = "Zoë's 2018 café\n\n  👍🏽"
    assert from_file.tokenizer().encode(text) == demo.tokenizer().encode(text)


# --- config ---------------------------------------------------------------------------------------------


LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


def llama3_factors(scaling, theta=500000.0, head_dim=64):
    """Return Llama 3's factors, computed one by one as convert_hf_to_gguf does."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        old = scaling["original_max_position_embeddings"]
        if wavelength < old / scaling["high_freq_factor"]:
            factors.append(1)
        elif wavelength > old / scaling["low_freq_factor"]:
            factors.append(scaling["factor"])
        else:
            smooth = (old / wavelength - scaling["low_freq_factor"]) / (
                scaling["high_freq_factor"] - scaling["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered_from_its_factors(folder, factor):
    scaling = LLAMA3 | {"factor": factor}
    path = write_gguf(
        folder / f"llama3-{factor}.gguf",
        edit=lambda writer, tensors: tensors.update({"rope_freqs.weight": (llama3_factors(scaling), "F32")}),
        rope_theta=500000.0,
    )
    source = open_model(str(path), 1)
    assert source.fields()["rope_scaling"] == {"rope_type": "llama3"} | scaling
    assert source.config.rope.factor == factor
    assert set(source.tensors.tensors) == set(source.plan.tensors)


@pytest.mark.parametrize(
    "factors",
    [
        llama3_factors(LLAMA3 | {"high_freq_factor": 3.0}),
        llama3_factors(LLAMA3 | {"original_max_position_embeddings": 4096}),
        np.linspace(1, 8, 32, dtype=np.float32),
        np.ones(16, np.float32),
    ],
    ids=["high", "original", "longrope", "shape"],
)
def test_other_rope_factors_are_rejected(folder, refused, factors):
    path = write_gguf(
        folder / "factors.gguf",
        edit=lambda writer, tensors: tensors.update({"rope_freqs.weight": (factors, "F32")}),
        rope_theta=500000.0,
    )
    assert "rope_freqs.weight" in refused("generate", "hi", "--model", path)


def test_linear_rope(folder):
    def edit(writer, tensors):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    path = write_gguf(folder / "linear.gguf", edit=edit)
    rope = open_config(str(path)).rope
    assert (rope.rope_type, rope.factor) == ("linear", 4.0)


def test_head_size_in_metadata(folder):
    def edit(writer, tensors):
        writer.add_key_length(32)
        writer.add_value_length(32)
        writer.add_rope_dimension_count(32)

    path = write_gguf(folder / "head_dim.gguf", edit=edit, head_dim=32)
    assert open_model(str(path), 4).config.head_dim == 32


def test_all_end_of_text_tokens(folder):
    path = write_gguf(folder / "ends.gguf", edit=lambda writer, _: writer.add_eot_token_id(9))
    assert open_config(str(path)).eos_token_ids == (257, 9)


def test_unknown_metadata_is_named_in_a_warning(folder, capsys):
    path = write_gguf(folder / "unknown.gguf", edit=lambda w, _: w.add_float32("llama.logit_scale", 0.5))
    assert open_config(str(path)).unread == ("llama.logit_scale",)
    assert main(["generate", "--tokens", "5", "-n", "1", "--tp", "1", "--model", str(path)]) == 0
    assert f"the metadata of {path} has a field 'llama.logit_scale'" in capsys.readouterr().err


def test_chat_template(folder):
    def edit(writer, tensors):
        writer.add_pad_token_id(256)
        writer.add_chat_template("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ pad_token }}")

    path = write_gguf(folder / "chat.gguf", edit=edit)
    template = open_model(str(path), 1).chat_template()
    assert template.render([{"role": "user", "content": "Hi"}]) == "<s>Hi</s><s>"


@pytest.mark.mpi
def test_chat_through_llm(folder):
    def edit(writer, tensors):
        writer.add_chat_template("{{ bos_token }}{{ messages[0].content }}")

    path = write_gguf(folder / "llm.gguf", edit=edit)
    with LLM(str(path), tp=1) as llm:
        answer = llm.chat([{"role": "user", "content": "Hi"}], max_new_tokens=4, temperature=0)
        assert answer.token_ids == llm.generate("<s>Hi", max_new_tokens=4, temperature=0).token_ids


def test_served_name_is_the_file_name(plain_file):
    assert served_name(str(plain_file)) == "plain.gguf"


def test_without_a_chat_template(plain_file, refused):
    assert "has no chat template" in refused("chat", "--model", plain_file)


# --- rejected files -----------------------------------------------------------------------------------------


def edits():
    """Return a dict from a fault to (function that puts it into a file, expected message)."""
    down = "blk.1.ffn_down.weight"
    return {
        "experts": (lambda w, _: w.add_expert_count(8), "a mixture of experts"),
        "part": (lambda w, _: w.add_uint16("split.count", 3), "one of 3 parts of a model; name the parts"),
        "yarn": (
            lambda w, _: w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
            "llama.rope.scaling.type 'yarn' is not supported",
        ),
        "partial rope": (lambda w, _: w.add_rope_dimension_count(32), "expected the head size, 64"),
        "other tensor": (
            lambda _, t: t.update({"blk.0.attn_sub_norm.weight": (np.ones(4, np.float32), "F32")}),
            "attn_sub_norm.weight is not supported: a Llama model has no such tensor",
        ),
        "missing": (lambda _, t: t.pop(down), "layers.1.mlp.down_proj.weight is missing"),
        "shape": (
            lambda _, t: t.update({down: (np.ones((256, 256), np.float32), "F32")}),
            "has shape [256, 256], expected [256, 512]",
        ),
        "more layers": (
            lambda _, t: t.update({"blk.2.attn_norm.weight": (np.ones(256, np.float32), "F32")}),
            "llama.block_count is 2, but the file has tensors of 3 layers",
        ),
    }


@pytest.mark.parametrize("fault", edits())
def test_rejected(folder, refused, fault):
    edit, expected = edits()[fault]
    path = write_gguf(folder / "wrong.gguf", edit=edit)
    assert expected in refused("generate", "hi", "--model", path)
    if fault not in ("missing", "shape"):  # plan reads only the config
        assert expected in refused("plan", "--model", path, "--gpu", "h100", "--tp", "2")


def test_another_architecture(folder, refused):
    path = write_gguf(folder / "falcon.gguf", architecture="falcon")
    assert "architecture 'falcon' is not supported" in refused("generate", "hi", "--model", path)


def test_type_that_cannot_be_dequantized(folder, refused):
    def edit(writer, tensors):
        writer.add_tensor("blk.0.ffn_up.weight", np.ones((512, 256), np.int32))
        del tensors["blk.0.ffn_up.weight"]

    path = write_gguf(folder / "int.gguf", edit=edit)
    assert "tensors of type I32" in refused("generate", "hi", "--model", path)


def changed(path, start, data):
    """Write a copy of a file in which `data` replaces the bytes from `start` on; return its path."""
    content = bytearray(path.read_bytes())
    content[start : start + len(data)] = data
    copy = path.with_name("changed.gguf")
    copy.write_bytes(content)
    return copy


@pytest.mark.parametrize(
    ("start", "data", "expected"),
    [
        (0, b"GGML", "not a GGUF file"),
        (4, struct.pack("<I", 1), "has version 1"),
        (4, struct.pack(">I", 3), "is big-endian"),
        (16, struct.pack("<Q", 1 << 40), "truncated, or not a GGUF file"),
        (24, struct.pack("<Q", 1 << 60), "truncated, or not a GGUF file"),
    ],
)
def test_invalid_header(plain_file, refused, start, data, expected):
    assert expected in refused("generate", "hi", "--model", changed(plain_file, start, data))


def test_invalid_dimensions(plain_file, refused):
    content = plain_file.read_bytes()
    start = content.index(b"token_embd.weight") + len(b"token_embd.weight")
    for dimensions in (0, 5, 1 << 31):
        wrong = changed(plain_file, start, struct.pack("<I", dimensions))
        assert "tensor token_embd.weight has" in refused("generate", "hi", "--model", wrong)


@pytest.mark.parametrize("share", [0, 1e-5, 1e-3, 0.5, 0.999])
def test_truncated(folder, plain_file, refused, share):
    content = plain_file.read_bytes()
    short = folder / "short.gguf"
    short.write_bytes(content[: int(len(content) * share)])
    said = refused("generate", "hi", "--model", short)
    assert "the file is empty" in said if share == 0 else "GGUF file" in said or "truncated" in said


def test_no_such_file(folder, refused):
    assert "missing.gguf: no such file" in refused("generate", "hi", "--model", folder / "missing.gguf")


def test_without_the_gguf_library(plain_file, refused, monkeypatch):
    for module in [name for name in sys.modules if name.startswith("minitp.loading.gguf")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'minitp[gguf]'" in refused("generate", "hi", "--model", plain_file)


def test_errors_from_python_are_input_errors(plain_file):
    """Check the exception itself, which the command turns into one line."""
    with pytest.raises(InputError, match="not a GGUF file"):
        open_model(str(changed(plain_file, 0, b"GGML")), 1)


def test_plan_covers_every_tensor(plain_file):
    model = GgufModel(plain_file)
    assert set(make_plan(open_config(str(plain_file)), 2).tensors) == set(model.tensors.tensors)
