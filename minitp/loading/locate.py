"""The directory or GGUF file that a value of `--model` names, after a download if needed."""

import os
import re
import stat
from pathlib import Path

from minitp.errors import InputError
from minitp.loading.hub import HUB_FILES, HUB_ID, download, download_gguf
from minitp.loading.kinds import CONFIG, explain_directory, explain_file
from minitp.util.files import LFS_POINTER, broken_link, how_to_replace, require_readable, why_unreadable
from minitp.util.suggest import did_you_mean

DEMO = "smollm2"
RANDOM = "random:"
ADDRESS = re.compile(r"(?:https?://|hf://|hf\.co/|huggingface\.co/)(?:[\w.-]+\.\w+/)?([\w.-]+/[\w.-]+).*")


def locate(name, revision=None, files=HUB_FILES):
    """Return the path of a model's directory or GGUF file, which can be read.

    Parameters
    ----------
    name : str
        A value of `--model`, except random weights.
    revision : str or None
        A branch, tag or commit of a Hugging Face id.
    files : list of str
        The files (names or patterns) to download of a Hugging Face id.

    Raises
    ------
    InputError
    """
    mode = _mode(name)
    hub_id = HUB_ID.fullmatch(name) if mode is None else None
    if hub_id is not None and hub_id[2] is not None:
        return download_gguf(hub_id[1], hub_id[2], revision)
    if hub_id is not None and not name.endswith(".gguf"):
        try:
            return _readable(download(name, revision, files))
        except InputError as error:
            likely = _sibling(name)  # owner/name may be a mistyped directory, too
            if likely is None:
                raise
            raise InputError(f"{error}; or did you mean {likely}?") from error
    refuse_revision(name, revision)
    if mode is None and name == DEMO:
        from minitp.loading.demo import demo_directory

        return _readable(demo_directory())
    if mode is None:
        raise InputError(_nothing(name))
    path = Path(name)
    if stat.S_ISDIR(mode):
        return _readable(path)
    _check_file(path)
    return path


def refuse_revision(name, revision):
    """Raise an InputError if there is a revision, because this model is not one of the hub."""
    if revision is not None:
        raise InputError(
            f"--revision {revision}: only a Hugging Face id (owner/name) has revisions; omit it for --model "
            f"{name}"
        )


def _mode(name):
    """Return the mode of an existing path, or None; refuse one that cannot be reached."""
    try:
        return os.stat(name).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        if broken_link(name) is None:
            return None
        raise InputError(f"--model {name}: {why_unreadable(name, error)}") from error
    except OSError as error:
        raise InputError(f"--model {name}: {why_unreadable(name, error)}") from error
    except ValueError:  # a null character
        return None


def _nothing(name):
    """Return the error for a value of `--model` that names nothing."""
    address = ADDRESS.fullmatch(name)
    if address is not None:
        return f"--model {name}: an address; give the id alone, {address[1]}"
    if name.endswith(".gguf"):
        return f"--model {name}: no such file"
    full = os.path.expanduser(name)
    if full != name and os.path.exists(full):
        return f"--model {name}: the shell did not expand ~; give {full}"
    likely = _sibling(name)
    if likely is not None:
        return f"--model {name}: no such directory; did you mean {likely}?"
    return (
        f"--model {name}: no such directory; give a directory, a .gguf file, a Hugging Face id (owner/name), "
        f"{DEMO}, or {RANDOM}NAME"
    )


def _sibling(name):
    """Return the path of an existing file or directory that is spelled almost like `name`, or None."""
    parent, last = os.path.split(name.rstrip("/"))
    if not last.strip(".") or not os.path.isdir(parent or ".") or not os.access(parent or ".", os.R_OK):
        return None
    likely = did_you_mean(last, os.listdir(parent or "."), {})
    return None if likely is None else os.path.join(parent, likely)


def _readable(directory):
    """Return a directory, after a check that it has a config.json and that its files can be read.

    Parts of the weights are checked when their headers are read.
    """
    names = [name for name in HUB_FILES if "*" not in name]
    try:
        os.stat(directory / CONFIG)
    except PermissionError as error:
        raise InputError(f"--model {directory}: {why_unreadable(directory / CONFIG, error)}") from error
    except OSError:
        pass
    if not os.path.lexists(directory / CONFIG):
        raise InputError(f"--model {directory}: the directory {explain_directory(directory)}")
    for name in names:
        if os.path.lexists(directory / name):
            require_readable(directory / name)
    return directory


def _check_file(path):
    """Refuse a file that cannot be read or is not a GGUF file."""
    require_readable(path)
    with open(path, "rb") as file:
        start = file.read(4)
    if not start:
        raise InputError(f"{path}: the file is empty; download or copy it again")
    if LFS_POINTER.startswith(start):
        raise InputError(f"{path}: {how_to_replace(path)}")
    if start != b"GGUF":
        raise InputError(f"{path}: {explain_file(str(path))}")
