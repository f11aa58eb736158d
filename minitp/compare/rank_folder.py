"""The files of an engine's ranks in a folder: which of them belong to which rank, by their names."""

import os
import re
from pathlib import Path

from minitp.compare.files import TensorFile, open_dump
from minitp.errors import InputError
from minitp.shard import make_plan
from minitp.util.files import why_unreadable
from minitp.util.format import counted
from minitp.util.shares import shares_of_files

ARRAYS = (".safetensors", ".npz")
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".distcp")
# The number of a rank in the name of a file or folder, by the first pattern that fits.
RANK = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"model(\d+)-mp\d+",  # model0-mp4.safetensors, rank 0 of 4
        r"rank[-_.]?(\d+)",  # rank0, model-rank-0-part-0, mp_rank_00, tp_rank_0
        r"(?:^|[^a-z])(?:tp|mp|shard|gpu|device)[-_.]?\d+[-_.]r?(\d+)(?=\.|$)",  # llama_tp2_0, rank 0 of 2
        r"(?:^|[^a-z])(?:tp|mp|shard|gpu|device)[-_.]?(\d+)",
    )
]
SEVERAL_KINDS = re.compile(r"mp_rank_\d+_\d+")  # Megatron's folders with pipeline or expert parallelism
META = re.compile(r"consolidated\.\d+", re.IGNORECASE)  # consolidated.00.pth
EXAMPLES = "rank0.safetensors, rank_0/, mp_rank_00/, model-rank-0-part-0.safetensors"


class FilesOfRank(TensorFile):
    """The arrays of one rank, which are in one file or several.

    Attributes
    ----------
    paths : list of Path
    """

    def __init__(self, paths):
        self.paths, entries, self._files = paths, {}, {}
        files = [open_dump(path) for path in paths]
        for file in files:
            for name, entry in file.entries.items():
                if name in entries:
                    raise InputError(
                        f"{file.path}: array {name} is also in {self._files[name].path}; keep one of them"
                    )
                entries[name], self._files[name] = entry, file
        super().__init__(paths[0], entries, files[0].metadata)

    def _read(self, name):
        return self._files[name].read_as_stored(name)


def open_ranks(path):
    """Return the FilesOfRank of each rank, in rank order.

    Parameters
    ----------
    path : str or Path
        A directory with a file or a folder for each rank, or the only rank's file. A directory with a
        checkpoint that is not sharded counts as one rank.

    Raises
    ------
    InputError
        if a file of arrays cannot be read, a rank is missing, or no rank is found.
    """
    path = Path(path)
    if not path.is_dir():
        rank_of(path.name)  # refuses formats of others
        _refuse_pickles(path, [path])
        return [FilesOfRank([path])]
    try:
        children = sorted(path.iterdir())
    except OSError as error:
        raise InputError(f"{path}: {why_unreadable(path, error)}") from error
    of_rank, others, known = {}, [], []
    for child in children:
        files = _files_in(child) if child.is_dir() else [child]
        number = rank_of(child.name)
        if number is None and child.is_dir():
            continue
        known += files
        arrays = [file for file in files if file.suffix in ARRAYS]
        if number is None:
            others += arrays
        elif arrays:
            of_rank.setdefault(number, []).extend(arrays)
    if not of_rank and not others:
        _refuse_pickles(path, known)
        raise InputError(
            f"{path}: no arrays found; expected a .safetensors or .npz file for each rank, such as {EXAMPLES}"
            f"{_inner_folder(children)}"
        )
    if not of_rank:
        return [FilesOfRank(others)]
    missing = sorted(set(range(max(of_rank) + 1)) - of_rank.keys())
    if missing:
        raise InputError(
            f"{path}: has files of {counted(len(of_rank), 'rank')} up to rank {max(of_rank)}, but none of "
            f"rank {missing[0]}; ranks are counted from 0"
        )
    return [FilesOfRank(of_rank[number]) for number in sorted(of_rank)]


def refuse_too_many(path, ranks, config, what="files"):
    """Reject files, or arrays in one file, of more ranks than the model has attention heads."""
    heads = config.num_attention_heads
    if ranks > heads:
        raise InputError(
            f"{path}: it has {what} of {counted(ranks, 'rank')}, but the model has only "
            f"{counted(heads, 'attention head')}"
        )


def plan_of_files(path, ranks, config, split=None):
    """Return the Plan of an engine with files of `ranks` ranks; `split` has unequal shares."""
    refuse_too_many(path, ranks, config)
    return make_plan(config, ranks, shares_of_files(split, ranks))


def rank_of(name):
    """Return the number of the rank in the name of a file or folder, or None.

    >>> rank_of("model-rank-3-part-0.safetensors"), rank_of("mp_rank_01"), rank_of("model-00001-of-00002")
    (3, 1, None)
    """
    if SEVERAL_KINDS.match(name):
        raise InputError(
            f"{name}: a folder of pipeline or expert parallelism; lint needs one folder for each "
            "tensor-parallel rank: save with pipeline and expert parallel size 1"
        )
    if META.match(name):
        raise InputError(
            f"{name}: a file in Meta's own format, whose query and key rows have another order; convert it "
            "to Hugging Face's format"
        )
    found = next((match for pattern in RANK if (match := pattern.search(name))), None)
    return None if found is None else int(found[1])


def _files_in(folder):
    """Return the files in a rank's folder, also in folders in it."""
    return sorted(Path(parent) / name for parent, _, names in os.walk(folder) for name in names)


def _refuse_pickles(path, files):
    """Reject files that only Python can read."""
    pickle = next((file for file in files if file.suffix in PICKLES), None)
    if pickle is not None:
        name = pickle.name if pickle == path else pickle.relative_to(path)
        raise InputError(
            f"{path}: {name} is a pickle, which runs code when it is read; convert each rank's file with "
            "safetensors.torch.save_file(state_dict, 'rank0.safetensors'), as docs/lint.md shows"
        )


def _inner_folder(children):
    """Return a hint at a folder with the ranks' files, such as Megatron's iter_0000100; "" without one."""
    for child in children:
        if child.is_dir() and any(RANK[1].search(path.name) for path in child.iterdir()):
            return f"; its folder {child.name} has some"
    return ""
