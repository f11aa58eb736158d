"""The file B, in A's names or in those of another engine; or a folder with a file for each rank."""

from pathlib import Path

from minitp.compare.assembled import AssembledFile
from minitp.compare.files import open_dump
from minitp.compare.mapped import MappedFile
from minitp.compare.rank_folder import open_ranks, plan_of_files
from minitp.errors import InputError


def open_other(path, a, metadata, engine=None, split=None):
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
    split : str or None
        The shares of the ranks of B, as in "3,1"; None for equal shares.

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
    plan = plan_of_files(path, len(files), config, split)
    if engine:
        files = [MappedFile(file, engine, config, plan, rank) for rank, file in enumerate(files)]
    return AssembledFile(Path(path), files, a, plan, config.head_dim) if is_folder else files[0]
