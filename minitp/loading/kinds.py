"""The kinds of files that are not a model in Hugging Face's format, each with the way out.

A directory or repository is recognized by the names of its files, so nothing is read or downloaded for it.
"""

import fnmatch
import os
import re

from minitp.errors import InputError
from minitp.util.files import why_unreadable

CONFIG, WEIGHTS = "config.json", ("model.safetensors", "model.safetensors.index.json")
PYTORCH = ("*.bin", "*.pth", "*.pt", "*.ckpt")
TRAINING = ("training_args.bin", "optimizer", "scheduler", "rng_state")  # beginnings of a trainer's files

# The quantization in a GGUF file's name, before the number of a part; "UD" is a common prefix.
QUANTIZATION = re.compile(
    r"(?:^|[-._/])((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|MXFP4\w*|BF16|F16|F32|FP16))(?:-\d{5}-of-\d{5})?\.gguf$",
    re.IGNORECASE,
)


def explain(names, hub_id=None):
    """Return what a directory or repository holds instead of a model, and the way out, as the end of a line.

    Parameters
    ----------
    names : collection of str
        The names of its files, relative to it.
    hub_id : str or None
        The repository's id; None for a directory.
    """

    def having(*patterns):
        return sorted(name for name in names if any(fnmatch.fnmatch(name, p) for p in patterns))

    gguf, weights = gguf_models(names), having("*.safetensors")
    pytorch = [name for name in having(*PYTORCH) if not name.startswith(TRAINING)]
    if not names:
        return "is empty; copy or download the model again"
    if "adapter_config.json" in names:
        return (
            "holds a LoRA adapter, not a whole model; merge it into its base model (in peft: "
            "merge_and_unload(), then save_pretrained()) and give the result"
        )
    if having("consolidated*.pth"):
        return (
            "holds Meta's own format (consolidated.00.pth, params.json); use the model in Hugging Face's "
            "format, or convert it with transformers' convert_llama_weights_to_hf.py"
        )
    if having("consolidated*.safetensors") and not having("model*.safetensors"):
        return (
            "holds Mistral's own format (consolidated.safetensors, params.json); use config.json and "
            "model*.safetensors, which most of these repositories have, too"
        )
    if gguf and not weights:
        if hub_id is None:
            return f"holds GGUF files; give one of them, such as {gguf[0]}"
        kinds = quantizations(gguf)
        return (
            f"has only GGUF files; add a quantization, as in {hub_id}:{kinds[0]}; it has {short_list(kinds)}"
        )
    if not weights and pytorch:
        revision = "" if hub_id is None else ", or give a --revision that has safetensors"
        return (
            f"has its weights only in PyTorch's format ({pytorch[0]}), and minitp reads safetensors; "
            f"load them in transformers and write them with save_pretrained(){revision}"
        )
    inner = having("*/config.json")
    if inner and hub_id is None and CONFIG not in names:
        return f"has no config.json, but its folder {os.path.dirname(inner[0])} has one; give that folder"
    if having("model-*-of-*.safetensors") and not having(*WEIGHTS):
        return "lacks model.safetensors.index.json, which lists its files of weights; copy that, too"
    if weights and not having(*WEIGHTS):
        return f"has no model.safetensors and no model.safetensors.index.json, only {short_list(weights)}"
    if having(*WEIGHTS):
        return "has weights but no config.json; copy that, too"
    if CONFIG in names:
        return (
            "has a config.json but neither model.safetensors nor model.safetensors.index.json; copy or "
            "download the weights, too (minitp plan needs only config.json)"
        )
    return (
        "is no model in Hugging Face's format, which has a config.json and safetensors; it has "
        f"{short_list(sorted(names))}"
    )


def explain_file(path):
    """Return what a file is that is not a GGUF file, and the way out, as the end of a line."""
    if fnmatch.fnmatch(path, "*.safetensors") or path.endswith(".json"):
        return "one file of a model; give the directory that it is in, with its config.json"
    if any(fnmatch.fnmatch(path, pattern) for pattern in PYTORCH):
        return "a PyTorch file; give a directory with config.json and safetensors, or a GGUF file"
    return "not a GGUF file; --model needs a directory or a .gguf file"


def explain_directory(directory):
    """Return what a directory holds instead of a model, and the way out, as the end of a line."""
    try:
        folder_of_cache = _explain_cache(directory)
        names = [os.path.relpath(path, directory) for path in _files(directory, levels=2)]
    except OSError as error:
        raise InputError(f"--model {directory}: {why_unreadable(directory, error)}") from error
    return folder_of_cache or explain(names)


def _files(directory, levels):
    """Yield the paths of the files in a directory and, for more than one level, in its folders."""
    for entry in os.scandir(directory):
        if not entry.is_dir():
            yield entry.path
        elif levels > 1 and os.access(entry.path, os.R_OK | os.X_OK):
            yield from _files(entry.path, levels - 1)


def _explain_cache(directory):
    """Return what a folder of the hub's cache is, and the way out; None if it is no such folder."""
    inside = sorted(os.listdir(directory))
    models = [name.removeprefix("models--").replace("--", "/") for name in inside if name[:8] == "models--"]
    if models:
        return f"is a cache of the Hugging Face Hub; give one of its models, such as {models[0]}"
    if "snapshots" not in inside or "blobs" not in inside:
        return None
    snapshots = os.listdir(os.path.join(directory, "snapshots"))
    try:
        with open(os.path.join(directory, "refs", "main"), encoding="utf-8") as file:
            snapshots.insert(0, file.read().strip())
    except (OSError, UnicodeDecodeError):
        pass
    hub_id = os.path.basename(os.path.abspath(directory)).removeprefix("models--").replace("--", "/")
    if not snapshots:
        return f"is an empty folder of the hub's cache; give --model {hub_id} to download the model"
    return f"is the hub's cache of {hub_id}; give that id, or its folder snapshots/{snapshots[0]}"


def quantization_of(name):
    """Return the quantization in a GGUF file's name, such as Q4_K_M, or the file's name if it has none.

    >>> quantization_of("Q4_K_M/tiny-q4_k_m-00001-of-00002.gguf"), quantization_of("tiny.gguf")
    ('Q4_K_M', 'tiny.gguf')
    """
    found = QUANTIZATION.search(name)
    return os.path.basename(name) if found is None else found[1].upper()


def gguf_models(names):
    """Return those of the names that are GGUF files of language models, not of parts for images, sorted."""
    return sorted(
        name for name in names if name.endswith(".gguf") and not os.path.basename(name).startswith("mmproj")
    )


def quantizations(names):
    """Return the quantizations of GGUF files, sorted."""
    return sorted({quantization_of(name) for name in names})


def short_list(words, room=100):
    """Return words separated by commas, cut after about `room` characters.

    >>> short_list(["config.json", "a.bin", "b.bin"], 20)
    'config.json, a.bin and 1 more'
    """
    kept = 1
    while kept < len(words) and len(", ".join(words[: kept + 1])) <= room:
        kept += 1
    rest = len(words) - kept
    return ", ".join(words[:kept]) + (f" and {rest} more" if rest else "")
