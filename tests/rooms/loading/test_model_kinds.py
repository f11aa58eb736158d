"""Tests of directories and files that are no model, or cannot be read: one line that says what they are."""

import json
import os
import shutil

import pytest
from gguf_files import write_gguf
from tiny import write_tiny

from minitp.cli.inputs import check_output
from minitp.errors import InputError
from minitp.loading.gguf.model import GgufModel
from minitp.loading.kinds import short_list
from minitp.loading.source import open_config, open_model
from minitp.util.files import require_readable

# --- what a directory holds -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("", "is empty; copy or download the model again"),
        ("config.json", "has a config.json but neither model.safetensors"),
        ("config.json tokenizer.json training_args.bin", "has a config.json but neither model.safetensors"),
        ("config.json pytorch_model.bin optimizer.pt", "only in PyTorch's format (pytorch_model.bin)"),
        ("config.json model.pth", "only in PyTorch's format (model.pth)"),
        ("adapter_config.json adapter_model.safetensors", "holds a LoRA adapter, not a whole model"),
        ("params.json consolidated.00.pth tokenizer.model", "holds Meta's own format"),
        ("params.json consolidated.safetensors tekken.json", "holds Mistral's own format"),
        ("model.Q4_K_M.gguf model.Q8_0.gguf", "give one of them, such as model.Q4_K_M.gguf"),
        ("model.safetensors tokenizer.json", "has weights but no config.json"),
        ("config.json model-00001-of-00002.safetensors", "lacks model.safetensors.index.json"),
        ("config.json weights.safetensors", "no model.safetensors.index.json, only weights.safetensors"),
        ("README.md llama/config.json llama/model.safetensors", "but its folder llama has one"),
        ("a.txt b.txt", "is no model in Hugging Face's format"),
    ],
)
@pytest.mark.parametrize("command", [["generate", "hi"], ["shard"]], ids=" ".join)
def test_directory(tmp_path, refused, tiny, command, names, expected):
    directory = tmp_path / "directory"
    directory.mkdir()
    for name in names.split():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("{}")
    if "config.json" in names.split():
        shutil.copy(tiny / "config.json", directory)
    line = refused(*command, "--model", directory, "--tp", "1")
    assert line.startswith(f"minitp: --model {directory}: the directory ")
    assert expected in line
    assert len(line) < 300 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("model.safetensors", b"\x40\0\0\0", "one file of a model; give the directory that it is in"),
        ("config.json", b"{}", "one file of a model; give the directory that it is in"),
        ("pytorch_model.bin", b"PK", "a PyTorch file; give a directory"),
        ("consolidated.00.pth", b"PK", "a PyTorch file"),
        ("model.gguf", b"GGML", "not a GGUF file"),
        ("model.gguf", b"", "the file is empty; download or copy it again"),
        ("model.gguf", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer without"),
    ],
)
@pytest.mark.parametrize("command", [["generate", "hi"], ["plan"]], ids=" ".join)
def test_file(tmp_path, refused, command, name, content, expected):
    (tmp_path / name).write_bytes(content)
    line = refused(*command, "--model", tmp_path / name, "--tp", "1")
    assert line.startswith(f"minitp: {tmp_path / name}: ")
    assert expected in line


def test_weights_that_are_a_pointer_of_git(tmp_path, refused):
    directory = write_tiny(tmp_path / "model")
    (directory / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    assert "run git lfs pull in its directory" in refused("generate", "hi", "--model", directory)


def test_lists_are_short():
    assert len(short_list([f"model-{i:05d}-of-00100.safetensors" for i in range(100)])) < 120


# --- links ------------------------------------------------------------------------------------------------

READ = ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "chat_template.jinja"]


@pytest.mark.parametrize("name", READ)
def test_link_to_a_missing_file(tmp_path, refused, name):
    directory = write_tiny(tmp_path / "model")
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to("../blobs/123")
    expected = f"{directory / name}: a link to ../blobs/123, which is missing; copy that, too (cp -L follows"
    assert expected in refused("generate", "hi", "--model", directory, "--tp", "1")


def test_link_of_the_model_itself(tmp_path, refused):
    link = tmp_path / "model"
    link.symlink_to("elsewhere")
    for name in (link, link / "inside"):
        line = refused("plan", "--model", name)
        assert f"--model {name}: " in line
        assert "a link to elsewhere, which is missing" in line
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert "cannot be read: Too many levels of symbolic links" in refused("plan", "--model", loop)


def test_part_of_the_weights(tmp_path, refused):
    directory = write_tiny(tmp_path / "model")
    part = "model-00001-of-00001.safetensors"
    (directory / "model.safetensors").rename(directory / "data")
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": part}})
    )
    assert f"{part}: listed in the index, but missing" in refused("generate", "hi", "--model", directory)
    (directory / part).symlink_to("nowhere")
    assert f"{part}: a link to nowhere, which is missing" in refused("generate", "hi", "--model", directory)
    (directory / part).unlink()
    (directory / part).mkdir()
    assert f"{part}: a directory, expected a file" in refused("generate", "hi", "--model", directory)


@pytest.mark.parametrize("name", READ)
def test_directory_in_place_of_a_file(tmp_path, refused, name):
    directory = write_tiny(tmp_path / "model")
    (directory / name).unlink(missing_ok=True)
    (directory / name).mkdir()
    line = refused("generate", "hi", "--model", directory)
    assert f"{directory / name}: a directory, expected a file" in line


# --- permissions ------------------------------------------------------------------------------------------

OTHER = 12345  # a user without an account


@pytest.fixture
def as_other_user(tmp_path):
    """Let this process have the rights of another user for the rest of the test, if it is root."""
    if os.geteuid() != 0:
        pytest.skip("only root can take the rights of another user")
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(folder.stat().st_mode | 0o055)
    groups = os.getgroups()

    def change():
        os.setgroups([])
        os.seteuid(OTHER)

    yield change
    os.seteuid(0)
    os.setgroups(groups)


@pytest.mark.parametrize("name", READ)
def test_file_of_another_user(tmp_path, refused, as_other_user, name):
    directory = write_tiny(tmp_path / "model")
    (directory / name).touch()
    (directory / name).chmod(0o600)
    as_other_user()
    line = refused("generate", "hi", "--model", directory, "--tp", "1")
    expected = "permission denied: it belongs to root and has mode 0600; let root run chmod a+r on it"
    assert f"{directory / name}: {expected}" in line


@pytest.mark.parametrize(("mode", "shown"), [(0o700, "0700"), (0o744, "0744")])
def test_directory_of_another_user(tmp_path, refused, as_other_user, mode, shown):
    directory = write_tiny(tmp_path / "closed" / "model")
    directory.parent.chmod(mode)
    as_other_user()
    line = refused("generate", "hi", "--model", directory)
    closed = (
        f"permission denied: {directory.parent} belongs to root and has mode {shown}; let root run chmod a+rx"
    )
    assert f"--model {directory}: {closed}" in line


def test_model_directory_of_another_user(tmp_path, refused, as_other_user):
    directory = write_tiny(tmp_path / "model")
    directory.chmod(0o700)
    as_other_user()
    line = refused("plan", "--model", directory)
    assert f"permission denied: {directory} belongs to root and has mode 0700" in line


def test_link_into_a_directory_of_another_user(tmp_path, refused, as_other_user):
    """Check that the culprit is named where the link leads, as in a shared cache."""
    directory = write_tiny(tmp_path / "model")
    blobs = tmp_path / "blobs"
    blobs.mkdir(mode=0o700)
    (directory / "model.safetensors").rename(blobs / "weights")
    (directory / "model.safetensors").symlink_to(blobs / "weights")
    as_other_user()
    assert f"permission denied: {blobs} belongs to root" in refused("generate", "hi", "--model", directory)


@pytest.mark.parametrize("command", ["perplexity", "compare"])
def test_inputs_of_another_user(tmp_path, tiny, refused, as_other_user, command):
    path = tmp_path / "input"
    path.touch(mode=0o600)
    model = ["--model", write_tiny(tmp_path / "model"), "--tp", "1"] if command == "perplexity" else [path]
    if command == "perplexity":
        (tmp_path / "model" / "model.safetensors").chmod(0o644)
    as_other_user()
    line = refused(command, path, *model)
    assert f"{path}: permission denied: it belongs to root and has mode 0600" in line


def test_owner_without_an_account(tmp_path, as_other_user):
    path = tmp_path / "file"
    path.touch(mode=0o600)
    os.chown(path, OTHER + 1, 0)
    as_other_user()
    with pytest.raises(InputError, match=f"belongs to user {OTHER + 1} and has mode 0600"):
        require_readable(path)


@pytest.mark.parametrize("command", ["trace", "check", "shard"])
def test_output_into_a_directory_of_another_user(tmp_path, tiny, refused, as_other_user, command):
    model = shutil.copytree(tiny, tmp_path / "model")
    (model / "model.safetensors").chmod(0o644)
    output = tmp_path / "closed"
    output.mkdir(mode=0o755)
    as_other_user()
    argv = {
        "trace": ["trace", "hi", "-o", output / "x.safetensors"],
        "check": ["check", "hi", "--report", output / "x.html"],
        "shard": ["shard", "-o", output],
    }[command]
    line = refused(*argv, "--model", model, "--tp", "1")
    assert f"{output}" in line
    assert "permission denied" in line.lower() or "no permission to write there" in line


def test_reason_why_an_output_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match=r"x.html: cannot be written \(No such file or directory\)"):
        check_output(tmp_path / "nothing" / "x.html", ".html")


# --- files that minitp writes -----------------------------------------------------------------------------


def test_converted_files_have_one_mode(tmp_path, as_other_user):
    """Check that other users may read the demo's weights like its other files, as the umask says."""
    ready = tmp_path / "ready"
    ready.mkdir()
    previous = os.umask(0o022)
    try:
        GgufModel(write_gguf(tmp_path / "tiny.gguf")).write_directory(ready)
    finally:
        os.umask(previous)
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in ready.iterdir()} == dict.fromkeys(
        ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"], "0o644"
    )
    as_other_user()
    assert open_model(str(ready), 1).config == open_config(str(ready))
