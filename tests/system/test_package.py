"""Tests of the wheel: it builds, contains all files of minitp, and runs once installed."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from paths import ROOT

from minitp import __version__

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def output_of(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return a copy of the source folder, because building leaves files in it."""
    copy = tmp_path_factory.mktemp("package") / "source"
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        copy.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "minitp", copy / "minitp", ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(source):
    output_of([*PIP, "wheel", "--no-deps", "--wheel-dir", str(source.parent), str(source)])
    (found,) = source.parent.glob("*.whl")
    return found


def test_an_editable_install_is_a_plain_path(source, tmp_path):
    """A path comes before a folder minitp without __init__.py; an import hook comes after it."""
    tools = tmp_path / "tools"
    output_of([*PIP, "install", "--target", str(tools), "setuptools>=77"])
    code = "import sys; from setuptools.build_meta import build_editable; build_editable(sys.argv[1])"
    options = dict(cwd=source, env={**os.environ, "PYTHONPATH": str(tools)})
    output_of([sys.executable, "-c", code, str(tmp_path)], **options)
    (found,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(found) as archive:
        files = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert [archive.read(name).decode().strip() for name in files] == [str(source)]


def test_wheel_contains_every_file(wheel):
    expected = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "minitp").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {Path(name).suffix for name in expected} >= {".py", ".cu", ".h", ".html", ".css", ".js"}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    about = f"minitp-{__version__}.dist-info/"
    assert {name for name in names if not name.startswith(about)} == expected
    assert {about + "METADATA", about + "entry_points.txt", about + "licenses/LICENSE"} <= names


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = message_from_bytes(archive.read(f"minitp-{__version__}.dist-info/METADATA"))
        scripts = archive.read(f"minitp-{__version__}.dist-info/entry_points.txt").decode()
    assert (metadata["Name"], metadata["Version"]) == ("minitp", __version__)
    assert metadata["License"] == "Apache-2.0"
    assert "minitp = minitp.cli.main:main" in scripts
    assert f"## {__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_installed_wheel_runs(wheel, tmp_path):
    site = tmp_path / "site"
    output_of([*PIP, "install", "--no-deps", "--target", str(site), str(wheel)])
    options = dict(cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)})
    command = [sys.executable, "-m", "minitp"]
    about = json.loads(output_of([*command, "info", "--json"], **options))["minitp"]
    assert about == {"version": __version__, "path": str(site / "minitp")}
    model = ["--model", "random:smollm2-135m", "--layers", "1", "--tp", "1"]
    out = output_of([*command, "generate", "--tokens", "1,2", "-n", "3", "--json", *model], **options)
    assert len(json.loads(out)["token_ids"]) == 3


def test_the_version_is_written_in_one_place():
    assert "attr: minitp.__version__" in (ROOT / "setup.cfg").read_text()
    assert "version" not in (ROOT / "pyproject.toml").read_text().replace("target-version", "")
