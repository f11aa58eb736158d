"""Scripts of run.py that are not minitp commands.

nccl | write FOLDER [NAME [LAYERS]] | loading FOLDER | goldens PATH DTYPE [FAMILY ..]
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from time import perf_counter

import ml_dtypes
import numpy as np

from minitp.errors import one_line
from minitp.loading.random_weights import random_config

GOLDENS = Path(__file__).resolve().parents[2] / "tests" / "goldens"
DECODED = 2


def goldens(path, dtype, *names):
    """Run `minitp check` on each family's small checkpoint in tests/goldens, all in this process.

    The exit code is 1 if a family is wrong, or if the path supports no family.
    """
    from minitp.comm.single import SingleRank
    from minitp.launch.transport import select_comm

    comm, found = select_comm(SingleRank(), "cuda"), {}
    for name in names or sorted(folder.parent.name for folder in GOLDENS.glob("*/config.json")):
        try:
            found[name], said = check_family(GOLDENS / name, comm, path, dtype)
        except Exception as error:  # the other families are still checked
            found[name], said = "wrong", one_line(error)
        print(f"{name}: {said}", flush=True)
    wrong, count = [name for name in found if found[name] == "wrong"], Counter(found.values())
    if wrong:
        sys.exit(f"wrong: {len(wrong)} of {len(found)} families: {', '.join(wrong)}")
    if not count["right"]:
        sys.exit(f"none of the families can use the {path} path ({len(found)} checked)")
    others = f"; not on the {path} path: {count['other']}" if count["other"] else ""
    print(f"right: {count['right']} of {len(found)} families{others}")


def check_family(folder, comm, path, dtype):
    """Return "right", "wrong" or "other" (not supported by the path), and a line that explains it."""
    from minitp.check.run import check_model
    from minitp.cli.check import verdict
    from minitp.cuda.fused import unfit
    from minitp.cuda.gpu import with_dtype
    from minitp.load import load_model
    from minitp.loading.source import open_model

    source = open_model(str(folder), 1)
    device = with_dtype(comm.gpu, dtype, source.config.dtype)
    reason = unfit(source.config, source.plan, device, "auto") if path == "fused" else None
    if reason is not None:
        return "other", f"not on the fused path: {reason}"
    model = load_model(source, comm, device, path=path)
    model.connect()
    with np.load(folder / "golden.npz") as golden:
        prompt = golden["prompt"].tolist()
    result = check_model(source, model, prompt, DECODED)
    return "right" if result.ok else "wrong", verdict(source, result)


def nccl():
    """Check with a single rank that NCCL's all-reduce and all-gather return their input."""
    from minitp.comm.single import SingleRank
    from minitp.cuda.nccl import NcclComm, load_nccl
    from minitp.launch.transport import select_comm

    gpu = select_comm(SingleRank(), "cuda").gpu
    comm = NcclComm(SingleRank(), gpu)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        x = np.arange(24).reshape(3, 8).astype(dtype)
        given = gpu.from_host(x)
        for found in (comm.all_reduce(given), comm.all_gather(given, [8])):
            np.testing.assert_array_equal(gpu.to_host(found), x)
    comm.check()
    comm.close()
    print(f"NCCL {load_nccl().get_version()}: all-reduce, all-gather and close")


def write(folder, name="mistral-7b", layers=None):
    """Write a model directory with bfloat16 weights that look random, and a tokenizer of bytes."""
    from tiny import byte_tokenizer

    from minitp.bench.fake_weights import TiledWeights
    from minitp.loading.config import parse_config
    from minitp.loading.safetensors_writer import TensorWriter
    from minitp.shard import make_plan

    fields, folder, started = random_config(name), Path(folder), perf_counter()
    if layers is not None:
        fields["num_hidden_layers"] = int(layers)
    folder.mkdir(parents=True, exist_ok=True)
    plan = make_plan(parse_config(fields, "a model"), 1)
    shapes = {name: shard.shape for name, shard in plan.tensors.items()}
    weights = TiledWeights(shapes, np.dtype(ml_dtypes.bfloat16))
    with TensorWriter(folder / "model.safetensors", shapes, {}) as file:
        for tensor, shard in plan.tensors.items():
            file.write(tensor, weights.read(tensor, shard.index(0)))
    (folder / "config.json").write_text(json.dumps(fields))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    size = (folder / "model.safetensors").stat().st_size
    print(f"{size / 1e9:.1f} GB written in {perf_counter() - started:.1f} s")


def loading(folder):
    """Run `minitp bench` with the model in `folder`, to measure how fast it is loaded from the page cache."""
    if not (Path(folder) / "config.json").exists():
        sys.exit("the model was not written")
    command = [sys.executable, "-m", "minitp", "bench", "--model", folder, "--device", "cuda", "--json"]
    sizes = ["--tp", "1", "--rounds", "1", "--prompt-tokens", "8", "-n", "2"]
    sys.exit(subprocess.run([*command, *sizes]).returncode)


PARTS = {"goldens": goldens, "nccl": nccl, "write": write, "loading": loading}

if __name__ == "__main__":
    PARTS[sys.argv[1]](*sys.argv[2:])
