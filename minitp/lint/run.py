"""`minitp lint`: an engine's shards, compared with the checkpoint that they were made from."""

from dataclasses import dataclass

from minitp.errors import InputError
from minitp.lint.judgement import Judge
from minitp.lint.layout import Expectation
from minitp.lint.names import KnownNames
from minitp.lint.origin import OriginSearch
from minitp.lint.pieces import UNKNOWN, CheckpointPieces
from minitp.lint.tensors import collect
from minitp.lint.values import DIFFERENT
from minitp.mapping.lookup import TensorLookup, engine_of
from minitp.util.shares import shares_of_files


@dataclass
class LintResult:
    """The result of linting shards.

    Attributes
    ----------
    engine : str
        The engine whose names the tensors have.
    tensors : list of ShardedTensor
        In the order of the checkpoint.
    pieces : CheckpointPieces
    faults, notes : dict of str to str
        As in `Judge`.
    """

    engine: str
    tensors: list
    pieces: CheckpointPieces
    faults: dict
    notes: dict

    @property
    def is_other_model(self):
        """True if most tensors have values that the checkpoint does not have."""
        held = [one for tensor in self.tensors for one in tensor.held if one is not None]
        return (
            sum(one.values.startswith(DIFFERENT) or (one.codes == UNKNOWN).any() for one in held)
            > len(held) / 2
        )


def lint(ranks, source, engine=None, progress=lambda nbytes: None, split=None):
    """Compare the shards of all ranks with a checkpoint.

    Parameters
    ----------
    ranks : list of FilesOfRank
    source : ModelSource
    engine : str or None
        The engine whose names the tensors have; None: recognized by the names.
    progress : callable
        A function that is called with the bytes read since its last call.
    split : str or None
        The ranks' shares of the model, as in "3,1"; None for equal shares.

    Returns
    -------
    LintResult

    Raises
    ------
    InputError
        if the number of shares is not that of the ranks, a tensor has a dtype or a shape that weights cannot
        have, or no tensor belongs to the checkpoint.
    """
    shares, pieces = shares_of_files(split, len(ranks)), CheckpointPieces(source)
    engine = engine or engine_of([name for rank in ranks for name in rank.entries])
    known = KnownNames(TensorLookup(engine, source.config), pieces)
    collected = collect(ranks, known, pieces, source.config.num_local_experts)
    tensors = collected.tensors
    search = OriginSearch(pieces, Expectation(source.config, len(ranks), pieces, shares))
    named = [tensor for tensor in tensors if tensor.by_name]
    search.find(named, ranks, progress)
    claimed = {part for tensor in named for part in tensor.layout.parts}
    search.identify([tensor for tensor in tensors if not tensor.by_name], ranks, claimed, progress)
    if not any(tensor.layout.parts for tensor in tensors):
        raise InputError(
            f"{ranks[0].path}: no tensor belongs to {source.name}, by its name or by its content; are "
            "these the shards of another model?"
        )
    order = {name: number for number, name in enumerate(pieces.names)}
    tensors.sort(key=lambda tensor: min((order[part] for part in tensor.layout.parts), default=len(order)))
    judge = Judge(collected, pieces, search.expectation, engine)
    judge.judge()
    return LintResult(engine, tensors, pieces, judge.faults, judge.notes)
