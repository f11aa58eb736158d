"""Tests as a user without a home directory, and with temporary folders that cannot be used."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from running import START_S, WORKER, Running, result_of

from minitp.cli import info
from minitp.cli.editors import message_editor
from minitp.cli.main import main

pytestmark = pytest.mark.mpi

# A user without an entry in /etc/passwd, who may still read the files of this Python and of minitp.
NOBODY = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", "--inh-caps=+dac_read_search"]
NOBODY += [
    "--ambient-caps=+dac_read_search",
    "env",
    "-u",
    "HOME",
    "-u",
    "XDG_CACHE_HOME",
    "-u",
    "HF_HOME",
    "-u",
    "HF_HUB_CACHE",
]
NO_HOME = "there is no home directory: HOME is not set, and no user has the number 12345; set HOME, or set"


def why_not():
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("setpriv") is None:
        return "another user needs Linux, root and setpriv"
    done = subprocess.run([*NOBODY, sys.executable, "-c", "0"], capture_output=True, text=True)
    return done.stderr.strip()


as_nobody = pytest.mark.skipif(bool(why_not()), reason=why_not() or "none")


def started(*argv):
    return Running([*NOBODY, *WORKER, *argv], PYTHONDONTWRITEBYTECODE="1")


@as_nobody
def test_a_user_without_a_home_runs_two_ranks(tiny):
    argv = ["generate", "Hello", "--model", tiny, "-n", "4", "--json", "--tp", "2"]
    for folder in (tiny, tiny.parent, tiny.parent.parent):
        os.chmod(folder, 0o755)
    assert len(result_of(started(*argv))["token_ids"]) == 4


@as_nobody
@pytest.mark.parametrize(
    ("argv", "variable"),
    [
        (["generate", "Hello"], "XDG_CACHE_HOME"),
        (["tour", "Hello"], "XDG_CACHE_HOME"),
        (["generate", "Hello", "--model", "owner/name"], "HF_HOME"),
    ],
)
def test_a_user_without_a_home_is_told_what_to_set(argv, variable):
    code, out, err = started(*argv, "--tp", "2").end(START_S)
    assert (code, out, err) == (2, "", f"minitp: {NO_HOME} {variable} to a directory\n")


@pytest.fixture
def no_home(monkeypatch):
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)


def test_chat_keeps_no_history_without_a_home(no_home):
    with message_editor() as editor:
        assert editor.help


def test_info_without_a_home(no_home):
    assert "set XDG_CACHE_HOME to a directory" in info.attempt(info.demo_model)["error"]


# --- temporary folders ----------------------------------------------------------------------------------


def test_no_temporary_folder(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert main(["generate", "Hello", "--model", str(tiny), "--tp", "2"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("minitp: no folder for the ranks' socket: FileNotFoundError: ")
    assert "set TMPDIR to a folder that can be written" in err
    assert len(err) < 300


@pytest.mark.parametrize("name", ["t" * 100, "é" * 50])  # 100 bytes each
def test_a_long_path_of_the_temporary_folder(tiny, name):
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, name)
        folder.mkdir()
        argv = [*WORKER, "generate", "Hello", "--model", tiny, "-n", "2", "--tp", "2"]
        environment = {**os.environ, "TMPDIR": str(folder)}
        done = subprocess.run(list(map(str, argv)), env=environment, capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")
        assert list(folder.iterdir()) == []
