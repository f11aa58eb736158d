"""Files of steps for the tests of `minitp compare`."""

import json

import numpy as np

from minitp.cli.main import main

TRACE = "prefill/layers.{}.{}"


def rng(seed=0):
    return np.random.default_rng(seed)


def arrays(seed=0, layers=4, dtype=np.float32):
    """Return steps of an invented model: heads [4, 6, 8], the rest [6, 32]."""
    draw = rng(seed).standard_normal
    found = {"prefill/embed": draw((6, 32))}
    for i in range(layers):
        found[TRACE.format(i, "attn.q")] = draw((4, 6, 8))
        found[TRACE.format(i, "attn.context")] = draw((6, 32))
        found[TRACE.format(i, "mlp.out")] = draw((6, 32))
    return {name: array.astype(dtype) for name, array in found.items()}


def write(path, content, **metadata):
    """Write arrays in the order of `content`, which safetensors' save_file would sort by name."""
    if path.suffix == ".npz":
        np.savez(path, **content)
        return path
    names = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}
    names |= {"int32": "I32", "bool": "BOOL"}
    header, start = {"__metadata__": metadata} if metadata else {}, 0
    for name, array in content.items():
        stop = start + array.nbytes
        header[name] = {"dtype": names[array.dtype.name], "shape": array.shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    data = b"".join(array.tobytes() for array in content.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def command(capsys, *argv):
    """Run `minitp compare` without errors; return its exit code and what it printed."""
    code = main(["compare", *map(str, argv)])
    captured = capsys.readouterr()
    assert captured.err == ""
    return code, captured.out
