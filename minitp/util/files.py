"""Reading of files, and the reasons why one cannot be read, in words for an error of one line."""

import json
import os
import pwd
from pathlib import Path

from minitp.errors import InputError

LFS_POINTER = b"version https://git-lfs"  # the first bytes of a file that stands for a large one in git


def read_json(path):
    """Return the object in a JSON file, or raise an InputError that says what is wrong with the file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply for Python
        raise InputError(f"{path}: not valid JSON: {error}; {how_to_replace(path)}") from error
    except OSError as error:
        raise InputError(f"{path}: {why_unreadable(path, error)}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def how_to_replace(path):
    """Return how to get a damaged file again; deleting a file of the cache leaves its contents there."""
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            return "it is a Git LFS pointer without the contents: run git lfs pull in its directory"
    if any(part.startswith("models--") for part in Path(path).parts):
        return "delete its models--* folder and run the command again"
    return "download or copy it again"


def require_readable(path):
    """Raise an InputError with the reason unless the file can be opened for reading."""
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise InputError(f"{path}: {why_unreadable(path, error)}") from error


def why_unreadable(path, error):
    """Return why a file or directory cannot be read, and the way out.

    Parameters
    ----------
    path : str or Path
    error : OSError
        The error that opening the file or listing the directory has raised.
    """
    if isinstance(error, PermissionError):
        return _denied(path)
    link = broken_link(path)
    if link is not None:
        which = "" if str(link) == str(path) else f"{link} is "
        return f"{which}a link to {os.readlink(link)}, which is missing; copy that, too (cp -L follows links)"
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "a directory, expected a file"
    return f"cannot be read: {error.strerror or error}"


def broken_link(path):
    """Return the outermost part of a path that is a link to a missing file, or None."""
    path = Path(path)
    for part in (*reversed(path.parents), path):
        if os.path.islink(part):
            try:
                os.stat(part)
            except FileNotFoundError:
                return part
            except OSError:  # a loop of links, or no permission
                return None
    return None


def _denied(path):
    """Return which file or directory denies access, its owner and mode, and the way out."""
    real = Path(os.path.realpath(path))
    effective = os.access in os.supports_effective_ids
    closed = (d for d in reversed(real.parents) if not os.access(d, os.X_OK, effective_ids=effective))
    culprit = next(closed, real)
    found = os.stat(culprit)
    try:
        owner = pwd.getpwuid(found.st_uid).pw_name
    except KeyError:  # a user of another machine or container
        owner = f"user {found.st_uid}"
    which = "it" if str(culprit) == str(path) else str(culprit)
    needed = "a+rx" if culprit.is_dir() else "a+r"
    return (
        f"permission denied: {which} belongs to {owner} and has mode {found.st_mode & 0o7777:04o}; "
        f"let {owner} run chmod {needed} on it"
    )
