"""Which arrays of two dumps are the same step, and whether the two are of the same model and tokens."""

import dataclasses
import json
import math
import re
from dataclasses import dataclass

from minitp.errors import InputError
from minitp.loading.config import Config, parse_config, read_json
from minitp.trace.names import AFTER, BEFORE, LAYER, split_name
from minitp.trace.write import FORMAT

FIRST_PASS = "prefill/"  # the pass of names that give none
MAY_DIFFER = {"dtype", "eos_token_ids", "max_position_embeddings", "num_hidden_layers", "unread"}
SHOWN = 3  # names in an error


@dataclass(frozen=True)
class TraceMetadata:
    """What the metadata of a trace of ours says, as far as it concerns a comparison."""

    fields: dict  # the object in config.json
    config: Config
    tp: int
    layers: int  # that it ran
    token_ids: list
    passes: dict  # name -> (start, stop)


def read_facts(dump):
    """The TraceMetadata of a trace of ours, None for a file of somebody else."""
    if dump.metadata.get("format") != FORMAT:
        return None
    try:
        text = {name: json.loads(dump.metadata[name]) for name in ("config", "tp", "token_ids", "passes")}
        passes = {name: (start, stop) for name, start, stop in text["passes"]}
        config = parse_config(text["config"], f"{dump.path}: its config")
        layers = int(dump.metadata.get("layers", config.num_hidden_layers))
        return TraceMetadata(text["config"], config, text["tp"], layers, text["token_ids"], passes)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{dump.path}: says it is {FORMAT}, but its metadata is broken: {error!r}"
        ) from error


@dataclass(frozen=True)
class Exclusions:
    """Names that are not to be compared, though both may have them; `remarks` say why."""

    patterns: tuple = ()
    remarks: tuple = ()

    def __contains__(self, name):
        return any(re.match(pattern, name) for pattern in self.patterns)


def what_to_leave_out(a, b, a_facts, b_facts):
    """The Exclusions of two dumps, if both are traces of ours.

    That is passes after the first token that differs, which the two runs chose for themselves, and the ranks'
    own pieces if there are not as many ranks.

    Raises
    ------
    InputError
        if the two are of different models, or of different prompts.
    """
    if a_facts is None or b_facts is None:
        return Exclusions()
    for field in dataclasses.fields(Config):
        ours, theirs = getattr(a_facts.config, field.name), getattr(b_facts.config, field.name)
        if ours != theirs and field.name not in MAY_DIFFER:
            raise InputError(
                f"{b.path}: a trace of another model: {field.name} is {theirs} there and {ours} in {a.path}"
            )
    patterns, remarks = [], []
    if a_facts.tp != b_facts.tp:
        patterns.append(r"rank\d+/")
    if a_facts.layers != b_facts.layers:
        patterns += [rf"(.*/)?{step}$" for step in AFTER]
        remarks.append(
            f"{', '.join(AFTER)} are not compared: they come after {a_facts.layers} layers in A and "
            f"{b_facts.layers} in B"
        )
    parted = False
    for name in [name for name in a_facts.passes if name in b_facts.passes]:
        difference = _other_tokens(a_facts, b_facts, name)
        if difference and not parted:
            parted = True
            if f"{name}/" == FIRST_PASS:
                raise InputError(f"{b.path}: a trace of other tokens than {a.path}: {difference}")
            remarks.append(f"from {name} on nothing is compared: the tokens are others; {difference}")
        if parted:
            patterns.append(rf"(rank\d+/)?{re.escape(name)}/")
    return Exclusions(tuple(patterns), tuple(remarks))


def _other_tokens(a, b, name):
    """What differs in the tokens up to the end of a pass, as text; empty if nothing does."""
    (a_start, a_stop), (b_start, b_stop) = a.passes[name], b.passes[name]
    if (a_start, a_stop) != (b_start, b_stop):
        return f"{name} is of positions {a_start} to {a_stop - 1} in A, {b_start} to {b_stop - 1} in B"
    for position, (ours, theirs) in enumerate(zip(a.token_ids[:a_stop], b.token_ids[:b_stop], strict=True)):
        if ours != theirs:
            return f"token {position} is {ours} in A, {theirs} in B"
    return ""


def match(a, b, mapped, left_out):
    """Name in A -> name in B, of the arrays that both have, in the order in which the steps happen.

    Parameters
    ----------
    a, b : TensorFile
    mapped : dict of str to str
        From `read_map`; other names are looked for under the same name.
    left_out : Exclusions
    """
    in_file = {name: number for number, name in enumerate(a.entries)}
    names = sorted(a.entries, key=lambda name: (*_when(name), in_file[name]))
    names = [name for name in names if name not in left_out]
    pairs = {name: mapped.get(name) or _same(name, b.entries) for name in names}
    pairs = {name: partner for name, partner in pairs.items() if partner}
    if not pairs:
        raise InputError(
            f"{a.path} and {b.path} have no name in common: the one has {_some(a.entries)}, the other "
            f"{_some(b.entries)}; say with --map NAMES.json which is which"
        )
    return pairs


def _when(name):
    """Weights first, then the passes as they follow each other, and in them the steps as they happen.

    The order of the file does not tell, for many libraries sort names. It decides among names that are not
    ours, which come last in their pass.
    """
    name = re.sub(r"^rank\d+/", "", name)
    if name.startswith("weights/"):
        return -1, 0, 0
    passed, layer, step = split_name(name)
    decode = re.fullmatch(r"decode\.(\d+)", passed)
    number = int(decode[1]) if decode else 0
    table = BEFORE | AFTER if layer is None else LAYER
    if step not in table:
        return number, math.inf, math.inf
    place = -1 if step in BEFORE else math.inf if layer is None else layer
    return number, place, list(table).index(step)


def _same(name, others):
    """The name among `others`, with or without the first pass in front; or None."""
    choices = (name, name.removeprefix(FIRST_PASS), FIRST_PASS + name)
    return next((choice for choice in choices if choice in others), None)


def read_map(path, a, b):
    """The pairs that a JSON object of names in A to names in B means: name in A -> name in B.

    A `*` stands for a number, the same in both; a name in A may lack the pass `prefill/`.

    Raises
    ------
    InputError
        if a name is in neither way in its file.
    """
    pairs = {}
    for ours, theirs in read_json(path).items():
        if not isinstance(theirs, str) or ours.count("*") != theirs.count("*"):
            raise InputError(f"{path}: {ours!r}: {theirs!r}: expected two names, with as many * in each")
        pattern = re.escape(ours).replace(r"\*", r"(\d+)")
        matches = [re.fullmatch(f"(?:{FIRST_PASS})?{pattern}", name) for name in a.entries]
        named = {found[0]: _filled(theirs, found.groups()) for found in matches if found}
        if not named:
            swapped = "; the map goes from A's names to B's" if ours in b.entries else ""
            raise InputError(
                f"{path}: {ours!r} is no name in {a.path}, which has {_some(a.entries)}{swapped}"
            )
        known = {name: partner for name, partner in named.items() if partner in b.entries}
        if not known:
            raise InputError(f"{path}: {theirs!r} is no name in {b.path}, which has {_some(b.entries)}")
        pairs |= known
    return pairs


def _filled(pattern, numbers):
    rest = iter(numbers)
    return re.sub(r"\*", lambda _: next(rest), pattern)


def _some(names):
    """A few of many names, as text."""
    listed = ", ".join(repr(name) for name in list(names)[:SHOWN])
    return f"{listed}, .." if len(names) > SHOWN else listed
