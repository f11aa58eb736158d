"""Tests of GGUF models in several files, and of GGUF files in a repository of the hub."""

import shutil

import gguf
import numpy as np
import pytest
from gguf_files import write_gguf
from hub import OWNER_NAME

from minitp.loading.gguf.model import GgufModel
from minitp.loading.source import open_config, open_model
from minitp.oracle.gguf import gguf_tensor

PARTS = 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The path of a GGUF file."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "whole.gguf", "Q8_0")


def split(path, stem, edit=lambda number, writer: None):
    """Write a GGUF file's tensors to three files, as llama-gguf-split does; return the path of the first."""
    reader = gguf.GGUFReader(path)
    for number in range(PARTS):
        part = stem.with_name(f"{stem.name}-{number + 1:05d}-of-{PARTS:05d}.gguf")
        writer = gguf.GGUFWriter(part, "llama")
        for field in reader.fields.values() if number == 0 else ():
            if not field.name.startswith(("GGUF.", "general.architecture")):
                kind = field.types[0]
                inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", PARTS)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        edit(number, writer)
        for tensor in reader.tensors[number::PARTS]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return stem.with_name(f"{stem.name}-00001-of-{PARTS:05d}.gguf")


@pytest.mark.parametrize("given", range(1, PARTS + 1))
def test_any_part_opens_all(whole, tmp_path, given):
    split(whole, tmp_path / "model")
    path = tmp_path / f"model-{given:05d}-of-{PARTS:05d}.gguf"
    found, expected = open_model(str(path), 2), open_model(str(whole), 2)
    assert found.config == expected.config
    assert found.tokenizer().encode("Hello") == expected.tokenizer().encode("Hello")
    assert found.gguf.file.path.name == f"model-00001-of-{PARTS:05d}.gguf"
    assert len({info.file for info in found.tensors.tensors.values()}) == PARTS
    oracle = gguf_tensor(found.gguf.file.path)
    for name, shard in expected.plan.tensors.items():
        index = tuple(slice(0, n) for n in shard.shape)
        np.testing.assert_array_equal(found.tensors.read(name, index), expected.tensors.read(name, index))
        np.testing.assert_array_equal(oracle(name), expected.tensors.read(name, index))


def test_missing_part(whole, tmp_path, refused):
    first = split(whole, tmp_path / "model")
    (tmp_path / "model-00002-of-00003.gguf").unlink()
    for path in (first, tmp_path / "model-00003-of-00003.gguf"):
        line = refused("generate", "hi", "--model", path)
        assert f"{path}: the model has 3 parts, and model-00002-of-00003.gguf is missing; download or" in line
    (tmp_path / "model-00002-of-00003.gguf").symlink_to("nowhere")
    assert "model-00002-of-00003.gguf: a link to nowhere, which is missing" in refused(
        "plan", "--model", first
    )


def test_part_of_another_model(whole, tmp_path, refused):
    first = split(whole, tmp_path / "model")
    shutil.copy(tmp_path / "model-00003-of-00003.gguf", tmp_path / "model-00002-of-00003.gguf")
    assert "expected part 2 of 3, but its split.no is 2 and its split.count 3" in refused(
        "plan", "--model", first
    )
    other = split(
        whole, tmp_path / "more", lambda number, writer: writer.add_int32("split.tensors.count", 99)
    )
    assert "tensors, expected 99; download them again" in refused("plan", "--model", other)


def test_renamed_part(whole, tmp_path, refused):
    path = split(whole, tmp_path / "model").rename(tmp_path / "first.gguf")
    line = refused("plan", "--model", path)
    assert f"{path}: one of 3 parts of a model; name the parts as llama-gguf-split does" in line


# --- repositories of GGUF files -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repository(whole, tmp_path_factory):
    """The files of a repository with two quantizations, one of them split, in a folder."""
    folder = tmp_path_factory.mktemp("parts")
    split(whole, folder / "tiny-Q8_0")
    parts = {f"Q8_0/{path.name}": path.read_bytes() for path in sorted(folder.iterdir())}
    small = write_gguf(folder.parent / "small.gguf", "Q4_0").read_bytes()
    return {"README.md": b"", "tiny.q4_0.gguf": small, "mmproj-f16.gguf": b"no language model", **parts}


@pytest.mark.parametrize(("tag", "kind", "files"), [("q8_0", "Q8_0", 3), ("Q4_0", "Q4_0", 1)])
def test_quantization_of_a_repository(serving, repository, monkeypatch, tag, kind, files):
    """Check that only its files are downloaded, and that the model is found again offline."""
    hub = serving(repository)
    for _ in range(2):
        source = open_model(f"{OWNER_NAME}:{tag}", 2)
        assert {tensor.type.name for tensor in source.gguf.file.tensors.values()} == {"F32", kind}
        assert source.name == f"{OWNER_NAME}:{tag}"
        assert open_config(f"{OWNER_NAME}:{tag}").num_hidden_layers == 2
        fetched = hub.fetched()
        assert len(fetched) == files
        assert all(kind.lower() in name.lower() for name in fetched)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_file_of_a_repository_by_its_name(serving, repository):
    serving(repository)
    assert isinstance(open_model(f"{OWNER_NAME}:tiny.q4_0.gguf", 1).gguf, GgufModel)


def test_no_such_quantization(serving, repository, refusal):
    serving(repository)
    expected = "the repository has no Q2_K; it has Q4_0, Q8_0"
    assert refusal(model=f"{OWNER_NAME}:Q2_K") == f"--model {OWNER_NAME}:Q2_K: {expected}"


def test_quantization_of_a_repository_without_gguf(serving, refusal):
    serving({"config.json": b"{}", "model.safetensors": b""})
    assert "the repository has no GGUF files; omit :Q2_K" in refusal(model=f"{OWNER_NAME}:Q2_K")


def test_two_files_of_one_quantization(serving, refusal):
    serving({"a-Q4_0.gguf": b"", "b-Q4_0.gguf": b""})
    assert f"give one by its name, as in {OWNER_NAME}:a-Q4_0.gguf" in refusal(model=f"{OWNER_NAME}:Q4_0")


def test_part_missing_from_a_repository(serving, repository, refusal):
    serving({name: data for name, data in repository.items() if "00002" not in name})
    assert "the model has 3 parts, and tiny-Q8_0-00002-of-00003.gguf" in refusal(model=f"{OWNER_NAME}:Q8_0")


def test_quantization_while_offline(serving, repository, refusal, monkeypatch):
    serving(repository)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "unset HF_HUB_OFFLINE to download it" in refusal(model=f"{OWNER_NAME}:Q8_0")
