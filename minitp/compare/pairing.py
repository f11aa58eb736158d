"""The pairs of arrays in two files that are the same step, and a check of the models and tokens."""

import dataclasses
import json
import math
import re
from dataclasses import dataclass

from minitp.errors import InputError, shown
from minitp.loading.config import Config, parse_config
from minitp.trace.names import AFTER, BEFORE, INTEGERS, LAYER, split_name
from minitp.trace.write import FORMAT
from minitp.util.files import read_json
from minitp.util.shares import other_shares

FIRST_PASS = "prefill/"  # the pass of names that have no pass
MAY_DIFFER = {"dtype", "eos_token_ids", "max_position_embeddings", "num_hidden_layers", "unread"}
SHOWN = 2  # number of names in an error message
# Names of passes in the order in which they happen. Other names have the place of `prefill`.
PASSES = (r"prefill", r"prefill\.(\d+)", r"decode\.(\d+)", r"batch\.(\d+)\.seq(\d+)")


@dataclass(frozen=True)
class TraceMetadata:
    """The metadata of a minitp trace that a comparison needs."""

    fields: dict  # the object in config.json
    config: Config
    tp: int
    layers: int  # number of layers that were run
    token_ids: list
    passes: dict  # name -> (start, stop)


def read_metadata(dump):
    """Return the TraceMetadata of a minitp trace, or None for another program's file."""
    if dump.metadata.get("format") != FORMAT:
        return None
    try:
        values = {name: json.loads(dump.metadata[name]) for name in ("config", "tp", "token_ids", "passes")}
        passes = {name: (start, stop) for name, start, stop in values["passes"]}
        config = parse_config(values["config"], f"{dump.path}: its config")
        layers = int(dump.metadata.get("layers", config.num_hidden_layers))
        return TraceMetadata(values["config"], config, values["tp"], layers, values["token_ids"], passes)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{dump.path}: the format is {FORMAT}, but the metadata is damaged: {error!r}"
        ) from error


@dataclass(frozen=True)
class Exclusions:
    """The names that are not compared, although both files may have them; `remarks` gives the reasons."""

    patterns: tuple = ()
    remarks: tuple = ()

    def __contains__(self, name):
        return any(re.match(pattern, name) for pattern in self.patterns)


def exclusions(a, b, a_metadata, b_metadata):
    """Return the Exclusions of two files, of which A is a minitp trace.

    Excluded are the passes from the first token that differs on, because the two runs chose different tokens;
    the ranks' own arrays if the numbers of ranks or their shares differ; and the steps after the layers if
    the numbers of layers differ.

    Raises
    ------
    InputError
        if the two traces are of different models or prompts.
    """
    if a_metadata is None:
        return Exclusions()
    if b_metadata is None:
        layers = max(_layers_of(b), a_metadata.layers)  # a dump need not have all layers
        return _after_other_layers(a_metadata.layers, layers)
    for name, ours, theirs in differing(a_metadata.config, b_metadata.config):
        if name not in MAY_DIFFER:
            raise InputError(
                f"{a.path} and {b.path} are traces of different models: {name} is {shown(ours)} in the first "
                f"and {shown(theirs)} in the second"
            )
    patterns, remarks = [], []
    splits = [one.metadata.get("split") for one in (a, b)]
    if a_metadata.tp != b_metadata.tp or other_shares(*splits):
        patterns.append(r"rank\d+/")
    others = _after_other_layers(a_metadata.layers, b_metadata.layers)
    patterns += others.patterns
    remarks += others.remarks
    differs = False
    for name in [name for name in a_metadata.passes if name in b_metadata.passes]:
        difference = _token_difference(a_metadata, b_metadata, name)
        if difference and not differs:
            differs = True
            if f"{name}/" == FIRST_PASS:
                raise InputError(f"{a.path} and {b.path} are traces of different tokens: {difference}")
            remarks.append(f"{name} and later passes are not compared: {difference}")
        if differs:
            patterns.append(rf"(rank\d+/)?{re.escape(name)}/")
    return Exclusions(tuple(patterns), tuple(remarks))


def _layers_of(dump):
    """Return the number of layers of another program's file, by the names of its steps."""
    layers = [split_name(name)[1] for name in dump.entries]
    return 1 + max((layer for layer in layers if layer is not None), default=-1)


def _after_other_layers(a_layers, b_layers):
    """Return the Exclusions of the steps after the layers, if the numbers of layers differ."""
    if b_layers == a_layers:
        return Exclusions()
    patterns = tuple(rf"(.*/)?{step}$" for step in AFTER)
    text = f"the number of layers is {a_layers} in A and {b_layers} in B"
    return Exclusions(patterns, (f"{', '.join(AFTER)} are not compared: {text}",))


def _token_difference(a, b, name):
    """Describe the first difference of the tokens up to the end of a pass; empty if there is none."""
    (a_start, a_stop), (b_start, b_stop) = a.passes[name], b.passes[name]
    if (a_start, a_stop) != (b_start, b_stop):
        return f"{name} has positions {a_start} to {a_stop - 1} in A and {b_start} to {b_stop - 1} in B"
    for position, (ours, theirs) in enumerate(zip(a.token_ids[:a_stop], b.token_ids[:b_stop], strict=True)):
        if ours != theirs:
            return f"token {position} is {ours} in A and {theirs} in B"
    return ""


def match(a, b, mapped, excluded):
    """Return a dict from names in A to names in B of all common arrays, in the order of the forward pass.

    Parameters
    ----------
    a, b : TensorFile
    mapped : dict of str to str
        The pairs from `read_map`; other names are paired with the same name.
    excluded : Exclusions
    """
    index = {name: number for number, name in enumerate(a.entries)}
    names = sorted(a.entries, key=lambda name: (*_order(name), index[name]))
    names = [name for name in names if name not in excluded]
    pairs = {name: mapped.get(name) or same_name(name, b.entries) for name in names}
    pairs = {name: partner for name, partner in pairs.items() if partner}
    if not pairs and b.unfit:
        name, (shape, why) = next(iter(b.unfit.items()))
        raise InputError(f"{b.path}: no array can be compared: {name} {list(shape)}: {why}")
    if not pairs:
        raise InputError(
            f"{a.path} and {b.path} have no name in common: the first has {_some(a.entries)}, the second "
            f"{_some(b.entries)}; pair the names with --map NAMES.json"
        )
    return pairs


def differing(first, second):
    """Yield (name, value in the first, value in the second) of the fields of two dataclasses that differ."""
    for field in dataclasses.fields(first):
        ours, theirs = getattr(first, field.name), getattr(second, field.name)
        if dataclasses.is_dataclass(ours):
            yield from differing(ours, theirs)
        elif ours != theirs:
            yield field.name, ours, theirs


def _order(name):
    """Return a sort key: weights come first, then the passes in order, each with its steps in order.

    The order in the file is not used, because many libraries sort the names. Names that are not in the tables
    of `trace.names` come last in their pass. The tokens and positions of the prompt come before everything,
    because nothing can agree if they do not.
    """
    name = re.sub(r"^rank\d+/", "", name)
    pass_name, layer, step = split_name(name)
    number = pass_order(pass_name)
    if layer is None and step in INTEGERS:
        at = -2, INTEGERS.index(step)
        return ((-2,), *at) if number == (0,) else (number, *at)
    if name.startswith("weights/"):
        return (-1,), 0, 0
    table = BEFORE | AFTER if layer is None else LAYER
    if step not in table:
        return number, math.inf, math.inf
    layer = -1 if step in BEFORE else math.inf if layer is None else layer
    return number, layer, list(table).index(step)


def pass_order(name):
    """Return a tuple by which the names of passes sort.

    >>> sorted(["batch.2.seq10", "decode.1", "prefill.10", "batch.2.seq9", "prefill.9"], key=pass_order)
    ['prefill.9', 'prefill.10', 'decode.1', 'batch.2.seq9', 'batch.2.seq10']
    """
    for kind, pattern in enumerate(PASSES):
        match = re.fullmatch(pattern, name)
        if match:
            return kind, *map(int, match.groups())
    return (0,)


def same_name(name, others):
    """Return the key in `others` that matches `name`, ignoring the prefix `prefill/`, or None."""
    choices = (name, name.removeprefix(FIRST_PASS), FIRST_PASS + name)
    return next((choice for choice in choices if choice in others), None)


def read_map(path, a, b):
    """Read a map, a JSON object of names in A to names in B; return a dict of all pairs that it matches.

    A `*` stands for the same number in both names. Names in A may omit the pass `prefill/`.

    Raises
    ------
    InputError
        if a name matches nothing in its file.
    """
    pairs = {}
    for ours, theirs in read_names(path):
        pattern = re.escape(ours).replace(r"\*", r"(\d+)")
        matches = [re.fullmatch(f"(?:{FIRST_PASS})?{pattern}", name) for name in a.entries]
        named = {found[0]: _filled(theirs, found.groups()) for found in matches if found}
        if not named:
            swapped = "; the map goes from A's names to B's" if ours in b.entries else ""
            raise InputError(f"{path}: {ours!r} is not in {a.path}, which has {_some(a.entries)}{swapped}")
        known = {name: partner for name, partner in named.items() if partner in b.entries}
        if not known:
            raise InputError(f"{path}: {theirs!r} is not in {b.path}, which has {_some(b.entries)}")
        pairs |= known
    return pairs


def read_names(path):
    """Yield the pairs of names in a map, a JSON object, each with as many `*` in both names."""
    for ours, theirs in read_json(path).items():
        if not isinstance(theirs, str) or ours.count("*") != theirs.count("*"):
            raise InputError(f"{path}: {ours!r}: {theirs!r}: expected two names with the same number of *")
        yield ours, theirs


def _filled(pattern, numbers):
    rest = iter(numbers)
    return re.sub(r"\*", lambda _: next(rest), pattern)


def _some(names):
    """Return the first names as text."""
    listed = ", ".join(repr(name) for name in list(names)[:SHOWN])
    return f"{listed}, .." if len(names) > SHOWN else listed
