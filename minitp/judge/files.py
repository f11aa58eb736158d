"""The files of a recording: one file, one with the arrays of several ranks, or a folder with one per rank."""

import re
from pathlib import Path
from threading import Lock

from minitp.compare.mapped import MappedFile
from minitp.compare.pairing import FIRST_PASS, read_metadata
from minitp.compare.rank_folder import open_ranks, plan_of_files
from minitp.errors import InputError
from minitp.judge.names import RenamedFile, is_step, is_unknown, no_steps
from minitp.trace.names import split_name
from minitp.util.format import counted

IN_FILE = re.compile(r"rank(\d+)/(.+)")


class RankFile:
    """The steps of one rank in a file, under their full names; arrays that are not steps are left out.

    Attributes
    ----------
    path : Path
    entries : dict of str to Entry
    unknown : list of str
        The names of arrays that are left out, without the weights.
    """

    def __init__(self, dump, names, lock):
        self._dump, self.path, self._lock = dump, dump.path, lock
        self._names = {name if "/" in name else FIRST_PASS + name: stored for name, stored in names.items()}
        self.unknown = [name for name in names if is_unknown(name)]
        self._names = {name: stored for name, stored in self._names.items() if is_step(name)}
        self.entries = {name: dump.entries[stored] for name, stored in self._names.items()}

    def read(self, name):
        """Return an array in float64."""
        with self._lock:  # ranks are threads, and NumPy cannot read .npy headers in several threads
            return self._dump.read(self._names[name])


class RecordedFiles:
    """The files of a recording, opened.

    Parameters
    ----------
    path : path
        A file, or a folder with a file for each rank.
    engine : str or None
        The engine of `mapping.tensors.ENGINES` whose names the arrays have; None for those of `minitp trace`.
    config : Config or None
        The model's config, which the names of an engine need.
    names : str or None
        A file with a map of names, see `RenamedFile`.
    split : str or None
        The shares of the ranks of an engine, as in "3,1"; None for equal shares.

    Attributes
    ----------
    path : Path
    ranks : list of RankFile
    metadata : TraceMetadata or None
        The metadata of a trace; None for another program's arrays.
    facts : dict of str to str
        The metadata of the first file as it is written.

    Raises
    ------
    InputError
        If a file cannot be read, a rank is missing, or the ranks' traces are not of one run.
    """

    def __init__(self, path, engine=None, config=None, names=None, split=None):
        self.path, lock = Path(path), Lock()
        dumps = open_ranks(path)
        if engine is not None:
            plan = plan_of_files(path, len(dumps), config, split)
            dumps = [MappedFile(dump, engine, config, plan, rank) for rank, dump in enumerate(dumps)]
        if names is not None:
            dumps = [RenamedFile(dump, names) for dump in dumps]
        self.facts, self.metadata = dumps[0].metadata, read_metadata(dumps[0])
        if self.path.is_dir() or "rank" in self.facts:
            self._check_one_run(dumps)
            self.ranks = [RankFile(dump, {name: name for name in dump.entries}, lock) for dump in dumps]
        else:
            self.ranks = [RankFile(dumps[0], names, lock) for names in self._names_by_rank(dumps[0])]
        if self.layers == 0:
            raise no_steps(self.path, list(dumps[0].entries))

    @property
    def model(self):
        """The name of the model in the metadata, or None."""
        return self.facts.get("model") if self.metadata else None

    @property
    def layers(self):
        """The number of layers that were recorded."""
        if self.metadata is not None:
            return self.metadata.layers
        layers = [split_name(name)[1] for rank in self.ranks for name in rank.entries]
        return 1 + max((layer for layer in layers if layer is not None), default=-1)

    @property
    def unknown(self):
        """The names of arrays that are neither steps nor weights, of all ranks."""
        return list(dict.fromkeys(name for rank in self.ranks for name in rank.unknown))

    @property
    def assembled_from(self):
        """The number of ranks whose arrays were put together, or 1."""
        return self.metadata.tp if self.metadata is not None and len(self.ranks) == 1 else 1

    def _names_by_rank(self, dump):
        """Return {name: name in the file} for each rank that has arrays in a file, in order."""
        parts = {}
        for stored in dump.entries:
            match = IN_FILE.fullmatch(stored)
            if match:
                parts.setdefault(int(match[1]), {})[match[2]] = stored
        check_consecutive(self.path, sorted(parts))
        return [parts[rank] for rank in sorted(parts)] or [{name: name for name in dump.entries}]

    def _check_one_run(self, dumps):
        for rank, dump in enumerate(dumps):
            found, size = read_metadata(dump), len(dumps)
            if (found is None) != (self.metadata is None):
                raise InputError(
                    f"{self.path}: some of its files have the metadata of a trace and others not"
                )
            if found is None:
                continue
            if found.tp != size or dump.metadata.get("rank", str(rank)) != str(rank):
                its_rank, files = dump.metadata.get("rank"), counted(size, "file")
                raise InputError(
                    f"{dump.path}: it is rank {its_rank} of {found.tp}, in a recording of {files}; record "
                    "all ranks into an empty folder, and judge the folder"
                )
            own, first = ((one.config, one.layers) for one in (found, self.metadata))
            if own != first or dump.metadata.get("dtype") != self.facts.get("dtype"):
                raise InputError(
                    f"{dump.path}: its config, layers or dtype are not those of rank 0; record one run"
                )
            if (found.token_ids, found.passes) != (self.metadata.token_ids, self.metadata.passes):
                raise InputError(
                    f"{dump.path}: its tokens or passes are not those of rank 0; all ranks must run the same "
                    "sequence (record replicas with rank=0, ranks=1)"
                )


def check_consecutive(path, ranks):
    """Reject ranks that are not 0, 1, 2, .."""
    for expected, rank in enumerate(ranks):
        if rank != expected:
            raise InputError(f"{path}: it has rank {rank}, but not rank {expected}")
