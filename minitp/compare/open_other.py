"""The file B, in A's names or in those of another engine; or a folder with a file for each rank."""

from pathlib import Path

from minitp.compare.assembled import AssembledFile
from minitp.compare.files import open_dump
from minitp.compare.mapped import MappedFile
from minitp.compare.rank_folder import open_ranks, refuse_too_many
from minitp.errors import InputError
from minitp.shard import make_plan


def open_other(path, a, metadata, engine=None):
    """Open B, the file or folder that is compared with A.

    Parameters
    ----------
    path : path
        A file, or a folder with a file for each rank.
    a : TensorFile
    metadata : TraceMetadata or None
        The metadata of A.
    engine : str or None
        The engine whose names B has; None for A's names.

    Returns
    -------
    TensorFile

    Raises
    ------
    InputError
        If the file cannot be read, or needs a model's config that A does not have.
    """
    is_folder = Path(path).is_dir()
    files = open_ranks(path) if is_folder else [open_dump(path)]
    if metadata is None and (is_folder or engine):
        what = "a folder of ranks' files" if is_folder else f"--map {engine}"
        raise InputError(f"{what} needs the model's config, which {a.path} lacks; make A with minitp trace")
    if metadata is None:
        return files[0]
    config = metadata.config
    refuse_too_many(path, len(files), config)
    plan = make_plan(config, len(files))
    if engine:
        files = [MappedFile(file, engine, config, plan, rank) for rank, file in enumerate(files)]
    return AssembledFile(Path(path), files, a, plan, config.head_dim) if is_folder else files[0]
