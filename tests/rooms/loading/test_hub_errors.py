"""Tests of what the hub refuses or lacks: one line each that names the thing and the way out."""

import errno
import os
import re
import shutil

import huggingface_hub
import pytest
from hub import OWNER_NAME
from huggingface_hub import constants
from tiny import write_tiny

from minitp import LLM
from minitp.errors import InputError
from minitp.loading import locate
from minitp.loading.source import open_config, open_model

OTHER_COMMIT = "f" * 40


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of a repository with a tiny model."""
    directory = write_tiny(tmp_path_factory.mktemp("repository"))
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


# --- access ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "token", "expected"),
    [
        (401, "GatedRepo", None, "the model is gated; accept the license at {hub}/{id} and set HF_TOKEN"),
        (403, "GatedRepo", "hf_x", "and set HF_TOKEN to a token of the account that accepted it"),
        (401, "RepoNotFound", None, "no such repository at {hub}, or private: set HF_TOKEN"),
        (404, "RepoNotFound", "hf_x", "no such repository at {hub}, or HF_TOKEN gives no access to it"),
        (404, None, None, "no such repository at {hub}, or private"),
        (401, None, "hf_x", "{hub} rejects HF_TOKEN (401); make a new token at {hub}/settings/tokens"),
        (403, None, "hf_x", "denies access (403); accept the license at {hub}/{id}, and check HF_TOKEN"),
        (429, None, None, "status 429, and the cache {cache} lacks the model; wait, or set HF_TOKEN"),
        (503, None, None, "status 503, and the cache {cache} lacks the model; try again later"),
    ],
)
def test_refused_by_the_hub(serving, files, refusal, monkeypatch, tmp_path, status, code, token, expected):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's retries
    hub = serving(files)
    hub.status = status
    hub.headers = {"X-Error-Code": code} if code else {}
    if status == 401 and code is None:
        hub.headers = {"X-Error-Message": "Invalid credentials in Authorization header"}
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    line = refusal()
    assert line.startswith(f"--model {OWNER_NAME}: ")
    assert expected.format(hub=hub.address, id=OWNER_NAME, cache=tmp_path / "cache") in line


def test_token_is_sent(serving, files, monkeypatch):
    """Check that HF_TOKEN arrives at the hub."""
    hub, sent = serving(files), []
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    answer = hub.answer
    hub.answer = lambda request: (sent.append(request.headers["Authorization"]), answer(request))
    open_model(OWNER_NAME, 1)
    assert set(sent) == {"Bearer hf_secret"}


# --- no network -------------------------------------------------------------------------------------------


def test_offline(serving, files, refusal, monkeypatch, tmp_path):
    hub = serving(files)
    offline(monkeypatch)
    line = refusal()
    assert f"no such directory, and the cache {tmp_path / 'cache'} lacks the model" in line
    assert "unset HF_HUB_OFFLINE to download it" in line
    assert "(revision v1)" in refusal("--revision", "v1")
    assert hub.requests == []


def test_no_network(serving, files, refusal, monkeypatch, tmp_path):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub = serving(files)
    hub.close()
    line = refusal()
    assert f"the cache {tmp_path / 'cache'} lacks the model" in line
    assert f"{hub.address} cannot be reached (" in line
    assert "check the network and HF_ENDPOINT" in line


def test_offline_with_a_part_of_the_model(serving, files, refusal, monkeypatch):
    serving(files)
    open_config(OWNER_NAME)  # downloads only config.json
    offline(monkeypatch)
    assert open_config(OWNER_NAME).vocab_size == 258
    assert "lacks the model or a part of it" in refusal()


# --- revisions --------------------------------------------------------------------------------------------


def test_revision(serving, files, tmp_path, monkeypatch):
    """Check that a branch and a commit give their own files, also offline afterwards."""
    directory = write_tiny(tmp_path / "other", rms_norm_eps=1e-3)
    others = {path.name: path.read_bytes() for path in directory.iterdir()}
    serving(files, revisions={"v2": (OTHER_COMMIT, others)})
    for _ in range(2):
        assert open_model(OWNER_NAME, 1).config.rms_norm_eps == 1e-5
        assert open_model(OWNER_NAME, 1, revision="v2").config.rms_norm_eps == 1e-3
        assert open_config(OWNER_NAME, revision=OTHER_COMMIT).rms_norm_eps == 1e-3
        offline(monkeypatch)


@pytest.mark.mpi
def test_revision_reaches_the_ranks(serving, files):
    serving({}, revisions={"v2": (OTHER_COMMIT, files)})
    with LLM(OWNER_NAME, tp=1, revision="v2") as llm:
        assert len(llm.generate("hi", max_new_tokens=2, ignore_eos=True).token_ids) == 2


def test_no_such_revision(serving, files, refusal):
    serving(files, revisions={"v2": (OTHER_COMMIT, {})})
    expected = "--revision v3: no such branch, tag or commit; the repository has main, v2"
    assert refusal("--revision", "v3") == f"--model {OWNER_NAME}: {expected}"


@pytest.mark.parametrize("model", ["tiny", "smollm2", "random:smollm2-135m", "./nothing"])
@pytest.mark.parametrize("command", [["generate", "hi"], ["plan"], ["shard"], ["tour"]], ids=" ".join)
def test_revision_of_what_has_none(tiny, refused, command, model):
    model = tiny if model == "tiny" else model
    line = refused(*command, "--model", model, "--revision", "v1", "--tp", "2")
    expected = (
        f"--revision v1: only a Hugging Face id (owner/name) has revisions; omit it for --model {model}"
    )
    assert line == f"minitp: {expected}\n"


# --- repositories without a model that minitp reads -----------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("config.json tokenizer.json pytorch_model.bin", "only in PyTorch's format (pytorch_model.bin)"),
        ("config.json pytorch_model.bin", "give a --revision that has safetensors"),
        ("README.md m.Q8_0.gguf m.Q4_K_M.gguf", "add a quantization, as in {id}:Q4_K_M; it has Q4_K_M, Q8_0"),
        ("adapter_config.json adapter_model.safetensors", "holds a LoRA adapter"),
        ("config.json README.md", "has a config.json but neither model.safetensors"),
        ("README.md data.csv", "is no model in Hugging Face's format"),
        ("params.json consolidated.00.pth", "Meta's own format"),
    ],
)
def test_repository_without_a_model(serving, files, refusal, names, expected):
    hub = serving({name: files.get(name, b"x") for name in names.split()})
    line = refusal()
    assert line.startswith(f"--model {OWNER_NAME}: the repository ")
    assert expected.format(id=OWNER_NAME) in line
    assert not any(name.endswith((".bin", ".gguf", ".pth")) for name in hub.fetched())


# --- the cache --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left"), "no space left in the cache {cache}; free some"),
        (PermissionError(errno.EACCES, "Permission denied"), "{cache} cannot be written (Permission"),
        (OSError(errno.EROFS, "Read-only file system"), "(Read-only file system); set HF_HUB_CACHE"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), "failed (ConnectionResetError: [Errno 104]"),
        (RuntimeError("x" * 1000), "run the command again to continue it"),
    ],
)
def test_failed_download(refusal, monkeypatch, tmp_path, error, expected):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert expected.format(cache=tmp_path / "cache") in refusal()


def test_interrupted_download_continues(serving, files, refusal, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub = serving(files)
    hub.truncated = True
    assert "run the command again to continue it" in refusal()
    hub.truncated = False
    assert open_model(OWNER_NAME, 1).config.vocab_size == 258


def test_cache_that_is_a_file(serving, files, refusal, tmp_path):
    serving(files)
    (tmp_path / "cache").write_text("")
    assert f"the cache {tmp_path / 'cache'} cannot be written (" in refusal()


def test_damaged_weights_in_the_cache(serving, files, refusal, tmp_path):
    serving(files)
    weights = open_model(OWNER_NAME, 1).directory / "model.safetensors"
    weights.resolve().write_bytes(weights.read_bytes()[:100])
    folder = f"models--{OWNER_NAME.replace('/', '--')}"
    line = refusal()
    assert "truncated, or not a safetensors file" in line
    assert "delete its models--* folder and run the command again" in line
    shutil.rmtree(tmp_path / "cache" / folder)
    assert open_model(OWNER_NAME, 1).config.vocab_size == 258


def test_copied_cache_without_blobs(serving, files, refusal, monkeypatch):
    """Check that links to missing blobs are named, or replaced if the hub can be reached."""
    serving(files)
    weights = open_model(OWNER_NAME, 1).directory / "model.safetensors"
    target = os.readlink(weights)
    weights.resolve().unlink()
    offline(monkeypatch)
    line = refusal(model=weights.parent)
    assert re.search(f"{weights.name}: a link to .*{target[-20:]}, which is missing", line)
    assert "lacks the model or a part of it" in refusal()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert open_model(OWNER_NAME, 1).config.vocab_size == 258


def test_folders_of_the_cache(serving, files, refusal, tmp_path):
    serving(files)
    snapshot = open_model(OWNER_NAME, 1).directory
    root = snapshot.parent.parent
    expected = f"is the hub's cache of {OWNER_NAME}; give that id, or its folder snapshots/{snapshot.name}"
    assert refusal(model=root) == f"--model {root}: the directory {expected}"
    assert f"such as {OWNER_NAME}" in refusal(model=tmp_path / "cache")


# --- names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["./nothing", "../nothing", "/no/thing", "~/nothing", "owner/", "owner/name/", "a/b/c", ".", "-/x"],
)
def test_names_that_are_no_ids(serving, files, name):
    hub = serving(files)
    with pytest.raises(InputError):
        locate.locate(name)
    assert hub.requests == []


@pytest.mark.parametrize(
    "address",
    ["https://huggingface.co/owner/name", "hf.co/owner/name", "https://huggingface.co/owner/name/tree/main"],
)
def test_address_of_a_repository(refusal, address):
    assert "give the id alone, owner/name" in refusal(model=address)


def test_mistyped_directory(serving, tmp_path, refusal, monkeypatch, tiny):
    serving({})
    shutil.copytree(tiny, tmp_path / "models" / "tiny-llama")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "no such directory; did you mean ./models/tiny-llama?" in refusal(model="./models/tiny-lama")
    line = refusal(model="models/tiny-lama")  # may be an id
    assert "no such repository at" in line
    assert line.endswith("; or did you mean models/tiny-llama?")
    assert f"the shell did not expand ~; give {tmp_path}/models" in refusal(model="~/models")
    assert open_config("models/tiny-llama").vocab_size == 258
