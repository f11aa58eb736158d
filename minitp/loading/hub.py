"""The downloads from the Hugging Face Hub, into the cache that all of Hugging Face's libraries share.

A model has an id, owner/name, or, for one quantization of a repository of GGUF files, owner/name:Q4_K_M. The
environment variables of the `huggingface_hub` library apply: HF_TOKEN, HF_HUB_CACHE, HF_HUB_OFFLINE, ..
"""

import errno
import glob
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path

from minitp.errors import InputError
from minitp.loading.kinds import (
    CONFIG,
    WEIGHTS,
    explain,
    gguf_models,
    quantization_of,
    quantizations,
    short_list,
)
from minitp.util.environment import home_directory

HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::([\w.-]+))?", re.ASCII)  # owner/name, then a quantization

# The files to download. A repository may also hold the same weights in other formats.
HUB_FILES = [
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    *WEIGHTS,
    "model-*-of-*.safetensors",
]


def download(hub_id, revision, files=HUB_FILES):
    """Download a model's files (names or patterns) if the cache lacks them, and return their directory.

    Raises
    ------
    InputError
        If the hub or the cache does not allow it, or the repository has no model in Hugging Face's format.
    """
    directory = _snapshot(hub_id, revision, files)
    wanted = [[CONFIG]] if files == [CONFIG] else [[CONFIG], WEIGHTS]
    if all(any((directory / name).is_file() for name in names) for names in wanted):
        return directory
    raise InputError(f"--model {hub_id}: the repository {explain(_file_names(hub_id, revision), hub_id)}")


def download_gguf(hub_id, quantization, revision):
    """Download the GGUF files of one quantization, and return the path of the only or first one."""
    names = gguf_models(_file_names(hub_id, revision))
    model = f"--model {hub_id}:{quantization}"
    if not names:
        raise InputError(f"{model}: the repository has no GGUF files; omit :{quantization}")
    accepted = quantization.lower()
    found = [
        n for n in names if accepted in (quantization_of(n).lower(), n.lower(), os.path.basename(n).lower())
    ]
    if not found:
        raise InputError(
            f"{model}: the repository has no {quantization}; it has {short_list(quantizations(names))}"
        )
    models = sorted({re.sub(r"-\d{5}-of-\d{5}\.gguf$", ".gguf", name) for name in found})
    if len(models) > 1:
        raise InputError(
            f"{model}: the repository has several files of that quantization; give one by its name, as in "
            f"{hub_id}:{os.path.basename(models[0])} ({short_list(models)})"
        )
    directory = _snapshot(hub_id, revision, [glob.escape(name) for name in found])
    return directory / min(found)


def cache_directory():
    """Return the directory in which `huggingface_hub` keeps downloads."""
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def _check_home():
    """Raise InputError without a home directory, unless the cache is somewhere else."""
    if not any(map(os.environ.get, ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"))):
        home_directory("HF_HOME")


def _snapshot(hub_id, revision, patterns):
    _check_home()
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()  # its warnings would come before an error of one line
    if not sys.stderr.isatty():
        disable_progress_bars()
    with _explained(hub_id, revision):
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))


def _file_names(hub_id, revision):
    """Return the names of a repository's files, or of those in the cache if the hub does not answer."""
    _check_home()
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError

    with _explained(hub_id, revision):
        try:
            return HfApi().list_repo_files(hub_id, revision=revision)
        except RevisionNotFoundError:
            raise
        except Exception as error:  # the hub client may raise any exception of its HTTP library
            directory = _cached_snapshot(hub_id, revision)
            if directory is None:
                raise LocalEntryNotFoundError("not in the cache") from error
            return [str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()]


def _cached_snapshot(hub_id, revision):
    """Return the directory of a revision in the cache, or None."""
    folder = Path(cache_directory()) / f"models--{hub_id.replace('/', '--')}"
    reference = folder / "refs" / (revision or "main")
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    directory = folder / "snapshots" / (commit or "main")
    return directory if directory.is_dir() else None


@contextmanager
def _explained(hub_id, revision):
    """Turn any error of the hub client within the block into an InputError with the way out."""
    try:
        yield
    except Exception as error:  # the hub client may raise any exception of its HTTP library
        raise InputError(f"--model {hub_id}: {_reason(error, hub_id, revision)}") from error


def _reason(error, hub_id, revision):
    """Return why the hub client failed, and the way out."""
    from huggingface_hub import constants, errors, get_token

    offline = isinstance(error, errors.LocalEntryNotFoundError)
    cause = error.__cause__ if offline and error.__cause__ is not None else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    hub, cache, token = constants.ENDPOINT, constants.HF_HUB_CACHE, get_token()
    version = "" if revision is None else f" (revision {revision})"
    if isinstance(cause, errors.GatedRepoError):
        whose = "set HF_TOKEN" if token is None else "set HF_TOKEN to a token of the account that accepted it"
        return f"the model is gated; accept the license at {hub}/{hub_id} and {whose}"
    if isinstance(cause, errors.RevisionNotFoundError):
        return f"--revision {revision}: no such branch, tag or commit{_revisions(hub_id)}"
    if isinstance(cause, errors.RepositoryNotFoundError) or status == 404:
        private = "or private: set HF_TOKEN" if token is None else "or HF_TOKEN gives no access to it"
        return f"no such directory, and no such repository at {hub}, {private}; check the name, too"
    if status == 401:
        return f"{hub} rejects HF_TOKEN (401); make a new token at {hub}/settings/tokens, or unset HF_TOKEN"
    if status == 403:
        return f"{hub} denies access (403); accept the license at {hub}/{hub_id}, and check HF_TOKEN's rights"
    if status is not None:
        wait = "wait, or set HF_TOKEN" if status == 429 else "try again later"
        return f"{hub} answers with status {status}, and the cache {cache} lacks the model; {wait}"
    if offline and constants.HF_HUB_OFFLINE:
        return (
            f"no such directory, and the cache {cache} lacks the model{version} or a part of it; unset "
            "HF_HUB_OFFLINE to download it"
        )
    if offline:
        return (
            f"no such directory, the cache {cache} lacks the model{version} or a part of it, and {hub} "
            f"cannot be reached ({type(cause).__name__}); check the network and HF_ENDPOINT"
        )
    if isinstance(error, errors.HFValidationError):
        return "no such directory, and not a valid Hugging Face id (owner/name); check the name"
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ENOSPC:
        return f"no space left in the cache {cache}; free some, or set HF_HUB_CACHE to another directory"
    if number is not None and not isinstance(error, ConnectionError | TimeoutError):
        return f"the cache {cache} cannot be written ({error.strerror}); set HF_HUB_CACHE to another"
    words = " ".join(str(error).split())
    return (
        f"the download from {hub} failed ({type(error).__name__}: {words[:100]}); run the command again to "
        "continue it"
    )


def _revisions(hub_id):
    """Return the branches and tags of a repository in words, or nothing if the hub does not tell."""
    from huggingface_hub import HfApi

    try:
        found = HfApi().list_repo_refs(hub_id)
    except Exception:  # the message is complete without them
        return ""
    names = [reference.name for reference in (*found.branches, *found.tags)]
    return f"; the repository has {short_list(names)}" if names else ""
