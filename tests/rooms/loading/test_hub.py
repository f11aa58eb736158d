"""Tests of downloads by Hugging Face id, from a hub on the loopback interface."""

import json

import pytest
from hub import COMMIT, OWNER_NAME, UNWANTED, WANTED, Hub, run_minitp
from safetensors.numpy import load_file, save_file
from tiny import write_tiny


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A model's directory, and the files of a repository with that model and files that minitp ignores."""
    directory = write_tiny(tmp_path_factory.mktemp("repository") / "model")
    (directory / "generation_config.json").write_text('{"eos_token_id": [257]}')
    (directory / "additional_chat_templates").mkdir()
    names = "tokenizer_config", "special_tokens_map", "added_tokens", "chat_template"
    for number, name in enumerate(names):  # equal files would be downloaded once
        (directory / f"{name}.json").write_text("{}" + number * "\n")
    for name in ("chat_template", "additional_chat_templates/tools"):
        (directory / f"{name}.jinja").write_text(f"{name} {{{{ messages[0].content }}}}")
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate([names[::2], names[1::2]], start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    paths = [path for path in directory.rglob("*") if path.is_file()]
    files = {str(path.relative_to(directory)): path.read_bytes() for path in paths}
    assert set(files) == WANTED
    return directory, files | {name: b"not for minitp" for name in UNWANTED}


@pytest.fixture
def hub(repository):
    server = Hub(repository[1])
    yield server
    server.close()


def tokens_of(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["token_ids"]


def test_files_are_downloaded_once(repository, hub, tmp_path):
    """Check that only files that minitp reads are downloaded, and that later runs need no network."""
    by_id = ["--model", OWNER_NAME, "--tp", "1"]
    first = run_minitp(tmp_path, hub.address, *by_id)
    expected = tokens_of(run_minitp(tmp_path, hub.address, "--model", repository[0], "--tp", "1"))
    assert tokens_of(first) == expected
    assert hub.fetched() == sorted(WANTED)
    for _, path in hub.requests:
        assert path.rpartition(COMMIT + "/")[2] not in UNWANTED

    hub.requests.clear()
    assert tokens_of(run_minitp(tmp_path, hub.address, *by_id)) == expected
    assert hub.fetched() == []

    hub.requests.clear()
    hub.close()
    assert tokens_of(run_minitp(tmp_path, hub.address, *by_id, HF_HUB_OFFLINE="1")) == expected
    assert tokens_of(run_minitp(tmp_path, hub.address, *by_id)) == expected, "the hub may be down"
    assert hub.requests == []


def test_no_progress_bar_without_a_terminal(hub, tmp_path):
    done = run_minitp(tmp_path, hub.address, "--model", OWNER_NAME, "--tp", "1")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.mpi
def test_ranks_share_one_download(repository, tmp_path):
    """Check that all ranks use one download, of the revision that the command line names."""
    hub = Hub({}, {"v2": ("f" * 40, repository[1])})
    try:
        by_id = ["--model", OWNER_NAME, "--revision", "v2"]
        done = run_minitp(tmp_path, hub.address, *by_id, "--tp", "2")
    finally:
        hub.close()
    assert tokens_of(done) == tokens_of(run_minitp(tmp_path, "", "--model", repository[0], "--tp", "2"))
    assert hub.fetched() == sorted(WANTED)
