"""The rank of this process, among those that a PyTorch model is sharded over, and the file that it writes."""

import sys
from pathlib import Path

from minitp.errors import InputError

OTHER_FORMATS = (".npz", ".npy", ".pt", ".pth", ".bin", ".gguf", ".json")


def rank_of(model, rank=None, ranks=None):
    """Return the number of this process and the number of processes; both are known if they are given.

    Otherwise they are those of torch.distributed, or 0 and 1 if it has not been initialized.
    """
    if (rank is None) != (ranks is None):
        raise InputError(f"rank {rank}, ranks {ranks}: give both or neither, as in rank=0, ranks=2")
    if rank is not None:
        if not 0 <= rank < ranks:
            raise InputError(f"rank {rank}: expected 0 to {ranks - 1}, because ranks is {ranks}")
        return rank, ranks
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    world = distributed.get_world_size()
    shards = getattr(model, "_tp_size", None) or world  # set by transformers
    if shards != world:
        raise InputError(
            f"the model is sharded over {shards} of {world} processes; give the rank= and ranks= of each "
            "process, and each replica its own path"
        )
    return distributed.get_rank(), world


def check_target(path):
    """Refuse a path that is a folder's or in a missing one, or has the ending of another format."""
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; create it first")
    if path.suffix == ".safetensors" and path.is_dir():
        raise InputError(f"{path}: a folder; give the name of a file")
    if path.suffix in OTHER_FORMATS:
        raise InputError(
            f"{path}: the recording is a safetensors file; give {path.with_suffix('.safetensors')}"
        )


def path_of_rank(path, rank, ranks):
    """Return the Path of the file that a rank writes, in a folder if there are several ranks."""
    path = Path(path)
    if ranks == 1:
        return path
    folder = path.with_suffix("") if path.suffix == ".safetensors" else path
    return folder / f"rank{rank}.safetensors"
