"""The sources of a model: a directory, a GGUF file, a Hugging Face id, the demo or random weights."""

import hashlib
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from minitp.errors import InputError
from minitp.loading.checkpoint import Checkpoint
from minitp.loading.config import Config, parse_config, read_config
from minitp.loading.kinds import CONFIG
from minitp.loading.locate import DEMO, RANDOM, locate, refuse_revision
from minitp.loading.random_weights import RandomWeights, random_config
from minitp.shard import make_plan
from minitp.text.chat_template import NoChatTemplateError, load_chat_template, make_chat_template
from minitp.text.tokenizer import Tokenizer, load_tokenizer
from minitp.text.tokenizer_config import read_tokenizer_config
from minitp.util.files import read_json
from minitp.util.format import counted
from minitp.util.shares import shares_in

DEMO_SHAPES = "smollm2-135m"  # random model with the demo's shapes
SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class ModelSource:
    """A model that has been found and checked, before any weight is read.

    Attributes
    ----------
    name : str
        The value of `--model`.
    directory : Path or None
        None for a GGUF file and for random weights.
    config : Config
    tensors : Checkpoint or RandomWeights
    plan : Plan
    gguf : GgufModel or None
        The open file if the model is a GGUF file, else None.
    split : str or None
        The value of --split that the plan follows; None for even shares.
    """

    name: str
    directory: Path | None
    config: Config
    tensors: object
    plan: object
    gguf: object = None
    split: str | None = None

    @property
    def is_random(self):
        """Return whether the weights are drawn, not read from a file."""
        return isinstance(self.tensors, RandomWeights)

    @property
    def shares(self):
        """The value of --split that gives the same plan, such as "3,1"; "1,1" for even shares."""
        return self.split or ",".join(["1"] * self.plan.tp)

    @property
    def ranks(self):
        """The number of ranks as text, with their shares if they are unequal."""
        shares = f" (--split {self.split})" if self.split and len(set(shares_in(self.split))) > 1 else ""
        return f"{counted(self.plan.tp, 'rank')}{shares}"

    def with_split(self, split):
        """Return the source with a plan that follows another value of --split, which has shares."""
        plan = make_plan(self.config, self.plan.tp, shares_in(split))
        return replace(self, plan=plan, split=split)

    def fields(self):
        """Return the object in config.json, or its equivalent for a GGUF file or random weights."""
        if self.is_random:
            return random_config(self.name.removeprefix(RANDOM))
        if self.gguf is not None:
            return self.gguf.fields
        return read_json(self.directory / "config.json")

    def fingerprint(self):
        """Return digests of the config and the weights, to detect a different model of the same name.

        Only three samples of each weights file are read, because two revisions usually differ everywhere.
        """
        files = [] if self.is_random else sorted({info.file for info in self.tensors.tensors.values()})
        parts = {"config": json.dumps(self.fields()).encode(), "weights": b"".join(map(sample, files))}
        return {part: hashlib.sha256(data).hexdigest() for part, data in parts.items()}

    def tokenizer(self):
        """Return the model's Tokenizer, or None if it has none."""
        if self.gguf is not None:
            raw = self.gguf.tokenizer()
            return None if raw is None else Tokenizer(raw)
        return None if self.is_random else load_tokenizer(self.directory)

    def tokenizer_fields(self):
        """Return the settings of the tokenizer, as in tokenizer_config.json; {} if it has none."""
        if self.gguf is not None:
            return self.gguf.tokenizer_fields()
        return {} if self.is_random else read_tokenizer_config(self.directory)

    def eos_token_ids(self, tokenizer):
        """Return the ids of all tokens that end a text or an answer: those of the config and the tokenizer's.

        A chat model's config may name only the token that ends a document, and its tokenizer the one that
        ends an answer.
        """
        ids = self.config.eos_token_ids
        eos = None if tokenizer is None else tokenizer.eos_token_id
        return ids if eos is None or eos in ids else (*ids, eos)

    def chat_template(self):
        """Return the model's ChatTemplate, or raise an InputError if it has none."""
        if self.is_random:
            raise NoChatTemplateError(f"{self.name} has no chat template: its weights are random")
        if self.gguf is not None:
            return make_chat_template(self.gguf.tokenizer_fields(), self.name)
        return load_chat_template(self.directory, self.name)


def open_model(name, tp, layers=None, revision=None, split=None):
    """Find a model, download it if needed, and check everything but the values of its weights.

    Parameters
    ----------
    name : str
        A value of `--model`.
    tp : int
    layers : int or None
        The number of layers to keep, from the first; None keeps all.
    revision : str or None
        A branch, tag or commit of a Hugging Face id; None means its main branch.
    split : str or None
        A value of `--split`. If the devices decide, the plan is even until `load.open_source` measures them.

    Raises
    ------
    InputError
    """
    shares = shares_in(split)
    split = None if shares is None else split
    if name.startswith(RANDOM):
        refuse_revision(name, revision)
        fields = random_config(name.removeprefix(RANDOM))
        config = parse_config(fields, name).with_layers(layers, name)
        plan = make_plan(config, tp, shares)
        shapes = {tensor: shard.shape for tensor, shard in plan.tensors.items()}
        return ModelSource(name, None, config, RandomWeights(shapes), plan, split=split)
    path = locate(name, revision)
    gguf = open_gguf(path) if path.is_file() else None
    directory = path if gguf is None else None
    whole = read_config(directory) if gguf is None else parse_config(gguf.fields, name)
    config = whole.with_layers(layers, directory or name)
    plan = make_plan(config, tp, shares)
    if gguf is None:
        checkpoint = Checkpoint(directory)
        checkpoint.split_joined(plan)
    else:
        checkpoint = gguf.tensors
    checkpoint.check(plan, whole.num_hidden_layers)
    return ModelSource(name, directory, config, checkpoint, plan, gguf, split)


def sample(path):
    """Return a file's length and its first, middle and last SAMPLE_BYTES, as bytes."""
    length = path.stat().st_size
    with open(path, "rb") as file:
        pieces = [str(length).encode()]
        for start in (0, length // 2, max(0, length - SAMPLE_BYTES)):
            file.seek(start)
            pieces.append(file.read(SAMPLE_BYTES))
    return b"".join(pieces)


def open_config(name, layers=None, revision=None):
    """Return the Config of the model that a value of `--model` names; no weights are needed.

    A directory needs only config.json. For a Hugging Face id, only config.json is downloaded, but the whole
    of a GGUF file; for the demo, nothing is.

    Raises
    ------
    InputError
    """
    if name.startswith(RANDOM):
        refuse_revision(name, revision)
        config = parse_config(random_config(name.removeprefix(RANDOM)), name)
    elif name == DEMO and revision is None and not os.path.lexists(name):
        config = parse_config(random_config(DEMO_SHAPES) | {"torch_dtype": "float16"}, name)
    else:
        path = locate(name, revision, [CONFIG])
        config = read_config(path) if path.is_dir() else parse_config(open_gguf(path).fields, name)
    return config.with_layers(layers, name)


def open_gguf(path):
    """Return the GgufModel of a file, or raise an InputError if the gguf package is not installed."""
    try:
        from minitp.loading.gguf.model import GgufModel
    except ImportError as error:
        raise InputError(
            f"{path}: reading GGUF files needs the package {error.name!r}; pip install 'minitp[gguf]', "
            "or use another --model"
        ) from error
    return GgufModel(path)


def warn_of_unread_fields(source):
    """Warn on stderr about unknown fields, which may make results wrong, and about a limited context."""
    if source.config.rope.rope_type == "longrope":
        print(
            f"minitp: warning: {source.name}: rope_type 'longrope' is supported only up to its original "
            f"context of {counted(source.config.max_position_embeddings, 'token')}",
            file=sys.stderr,
        )
    where = "config.json" if source.gguf is None else "the metadata"
    for name in source.config.unread:
        print(
            f"minitp: warning: {where} of {source.name} has a field {name!r} that minitp does not know; "
            "if it affects the computation, the results are wrong",
            file=sys.stderr,
        )
