"""Steps of benchmarks/gpu.py that are no minitp command."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np

from minitp.random_weights import random_config

LAYERS = 6  # of Mistral 7B: 3.1 GB


def nccl():
    """NCCL's calls with a single rank: an all-reduce and an all-gather give back what they got."""
    from minitp.comm import Alone
    from minitp.cuda.nccl import NcclComm, load_nccl
    from minitp.places import place_ranks

    gpu = place_ranks(Alone(), "cuda").gpu
    comm = NcclComm(Alone(), gpu)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        x = np.arange(24).reshape(3, 8).astype(dtype)
        given = gpu.from_host(x)
        for found in (comm.all_reduce(given), comm.all_gather(given, [8])):
            np.testing.assert_array_equal(gpu.to_host(found), x)
    comm.check()
    comm.close()
    print(f"NCCL {load_nccl().get_version()}: all-reduce, all-gather and the end")


def loading(name="mistral-7b", layers=LAYERS):
    """`minitp bench` of a model in a file, for how fast it is loaded."""
    with tempfile.TemporaryDirectory(prefix="minitp-loading-") as folder:
        write_model(Path(folder), random_config(name) | {"num_hidden_layers": layers})
        command = [sys.executable, "-m", "minitp", "bench", "--model", folder, "--device", "cuda", "--json"]
        sizes = ["--tp", "1", "--rounds", "1", "--prompt-tokens", "8", "-n", "2"]
        done = subprocess.run([*command, *sizes], capture_output=True, text=True)
        sys.stderr.write(done.stderr)
        if done.returncode:
            sys.exit(done.returncode)
        print(done.stdout.splitlines()[-1])


def write_model(folder, fields):
    """A model's directory with bfloat16 weights that look random."""
    from safetensors.numpy import save_file

    from minitp.bench.tiled import TiledWeights
    from minitp.config import parse_config
    from minitp.shard import make_plan

    plan = make_plan(parse_config(fields, "a model"), 1)
    shapes = {name: shard.shape for name, shard in plan.tensors.items()}
    weights = TiledWeights(shapes, np.dtype(ml_dtypes.bfloat16))
    tensors = {name: weights.read(name, shard.index(0)) for name, shard in plan.tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(fields))


PARTS = {"nccl": nccl, "loading": loading}
