"""How fast a model was loaded, beside what its file can be read with."""

from time import perf_counter

BUFFER_BYTES = 1 << 24
MOST_BYTES = 1 << 31  # that are read of a file


def loading(model, source, load_s):
    """Gigabytes a second of all ranks together: of the weights, and of the file, None if there is none.

    The file is read by all ranks at once, as it was for loading, so it comes from the page cache.
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
    """Bytes a second, reading a file from its beginning into one buffer again and again."""
    buffer, read = bytearray(BUFFER_BYTES), 0
    started = perf_counter()
    with open(path, "rb", buffering=0) as file:
        while read < MOST_BYTES and (count := file.readinto(buffer)):
            read += count
    return read / (perf_counter() - started)
