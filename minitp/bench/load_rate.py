"""The speed of loading a model, compared with that of only reading its file."""

from time import perf_counter

BUFFER_BYTES = 1 << 24
MOST_BYTES = 1 << 31  # maximum number of bytes to read from a file


def loading(model, source, load_s):
    """Return the GB/s of loading the weights and of reading the file (None without one), for all ranks.

    All ranks read the file at once, as they did for loading, so it comes from the page cache.
    """
    comm = model.comm
    weights = sum(comm.allgather_object(model.weights.nbytes))
    slowest = max(comm.allgather_object(load_s))
    found = {"seconds": slowest, "gb_per_s": weights / slowest / 1e9, "file_gb_per_s": None}
    files = sorted({info.file for info in getattr(source.tensors, "tensors", {}).values()})
    comm.allgather_object(None)
    if files:
        found["file_gb_per_s"] = sum(comm.allgather_object(read_rate(files[0]))) / 1e9
    return found


def read_rate(path):
    """Return the bytes per second of reading a file from its beginning, always into the same buffer."""
    buffer, read = bytearray(BUFFER_BYTES), 0
    started = perf_counter()
    with open(path, "rb", buffering=0) as file:
        while read < MOST_BYTES and (count := file.readinto(buffer)):
            read += count
    return read / (perf_counter() - started)
