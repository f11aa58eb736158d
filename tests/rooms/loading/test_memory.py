"""Tests of memory use: while loading, a rank's private memory never exceeds shard + slice + 200 MB."""

import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minitp import device, load
from minitp.cli import load_progress as loading
from minitp.cli import main as cli
from minitp.comm import run_threads
from minitp.errors import AgreedError

TP = 4
HIDDEN, FFN, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 2048, 102400, 4096, 32, 4, 64
ALLOWANCE = 200_000_000  # bytes for Python, numpy, the other libraries, and read buffers

# One layer with matrices large enough for the test to detect a rank that reads a whole one, even in float16:
# down_proj, which is loaded last, has 419 MB in the file and 210 MB as a rank's slice in float32.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "torch_dtype": "float16",
}
SHAPES = {
    "model.embed_tokens.weight": (VOCAB, HIDDEN),
    "model.norm.weight": (HIDDEN,),
    "lm_head.weight": (VOCAB, HIDDEN),
    "model.layers.0.input_layernorm.weight": (HIDDEN,),
    "model.layers.0.self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
    "model.layers.0.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "model.layers.0.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "model.layers.0.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
    "model.layers.0.post_attention_layernorm.weight": (HIDDEN,),
    "model.layers.0.mlp.gate_proj.weight": (FFN, HIDDEN),
    "model.layers.0.mlp.up_proj.weight": (FFN, HIDDEN),
    "model.layers.0.mlp.down_proj.weight": (HIDDEN, FFN),
}
REPLICATED = 3 * HIDDEN  # the norms; everything else divides evenly by TP
SHARD_BYTES = 4 * ((sum(int(np.prod(shape)) for shape in SHAPES.values()) - REPLICATED) // TP + REPLICATED)
SLICE_BYTES = 4 * HIDDEN * FFN // TP

# A rank that loads its shard, reports its size, and waits to be ended. The test samples its memory.
RANK = """
import sys
from minitp.device import open_device
from minitp.loading.source import open_model
from minitp.loading.weights import Loader

source = open_model(sys.argv[1], int(sys.argv[3]))
weights = Loader(source.plan, int(sys.argv[2]), source.tensors, open_device("float32")).load()
print(weights.nbytes, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A float16 checkpoint of 1.3 GB, which is deleted afterwards."""
    directory = tmp_path_factory.mktemp("memory")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    path = directory / "model.safetensors"
    try:
        write_checkpoint(path)
        assert path.stat().st_size > 1e9
        assert path.stat().st_blocks * 512 > 1e9  # no holes
        yield directory
    finally:
        path.unlink()


def write_checkpoint(path):
    """Write a checkpoint of random numbers, the same 8 MB repeated."""
    header, start = {}, 0
    for name, shape in SHAPES.items():
        stop = start + 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, stop]}
        start = stop
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    tile = np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32).astype(np.float16).tobytes()
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for at in range(0, start, len(tile)):
            file.write(tile[: start - at])


def private_bytes(pid):
    """Return RssAnon + RssShmem of a process, which exclude the pages of mapped files."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * sum(int(kilobytes) for kilobytes in re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", status))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("rank", [0, TP - 1])
def test_peak_memory_of_loading(directory, rank):
    """Load the ranks at both ends: a faulty one may read to the end of a tensor, or from its start."""
    command = [sys.executable, "-c", RANK, str(directory), str(rank), str(TP)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    started, peak, samples = time.monotonic(), 0, 0
    with subprocess.Popen(command, env=environment, **pipes) as process:
        os.set_blocking(process.stdout.fileno(), False)
        output = b""
        while not output.endswith(b"\n") and process.poll() is None and time.monotonic() < started + 120:
            peak = max(peak, private_bytes(process.pid))
            samples += 1
            time.sleep(0.002)
            output += process.stdout.read() or b""
        afterwards = private_bytes(process.pid) if process.poll() is None else 0
        process.kill()
    seconds = time.monotonic() - started
    print(
        f"rank {rank} of {TP}: shard {SHARD_BYTES / 1e6:.1f} MB, largest slice {SLICE_BYTES / 1e6:.1f} MB; "
        f"private memory at most {peak / 1e6:.1f} MB, afterwards {afterwards / 1e6:.1f} MB "
        f"({samples} samples in {seconds:.1f} s)"
    )
    assert output, "the rank failed, see its stderr"
    assert int(output) == SHARD_BYTES
    assert samples > 50
    assert SHARD_BYTES < afterwards <= SHARD_BYTES + ALLOWANCE
    assert peak <= SHARD_BYTES + SLICE_BYTES + ALLOWANCE


@pytest.mark.parametrize("command", ["generate", "bench"])
def test_weights_larger_than_the_memory(command, monkeypatch, capsys):
    """Check for an error before any weight is drawn, because 29 GB take minutes and would be killed."""
    monkeypatch.setattr(device, "memory", lambda: 8_000_000_000)
    argv = [
        "--model",
        "random:mistral-7b",
        "--tp",
        "1",
        *(["--tokens", "1"] if command == "generate" else []),
    ]
    started = time.monotonic()
    assert cli.main([command, *argv]) == 2
    assert time.monotonic() - started < 10
    assert capsys.readouterr().err.splitlines()[-1] == (
        "minitp: random:mistral-7b: the weights of 1 rank in float32 take 28.97 GB, but "
        f"the memory of {platform.node()} has only 8.00 GB; `minitp plan` shows what fits"
    )


@pytest.mark.parametrize(("room", "fits"), [(500, False), (799, False), (800, True)])
def test_ranks_on_one_gpu_share_its_memory(monkeypatch, room, fits):
    """Check that the weights of both ranks on GPU 0 must fit together; the third rank has GPU 1."""
    monkeypatch.setattr("minitp.load.shard_nbytes", lambda plan, rank, device: 400)
    source = SimpleNamespace(name="model", plan=None)

    def rank(comm):
        where = f"GPU {comm.rank // 2}"
        gpu = SimpleNamespace(weights_room=lambda: (where, room), dtype="float16", is_gpu=True)
        loading.check_room(comm, source, gpu)

    if fits:
        run_threads(3, rank)
    else:
        with pytest.raises(AgreedError, match=r"of 2 ranks in float16 take 800 B, but GPU 0 has"):
            run_threads(3, rank)


@pytest.mark.parametrize("split", ["auto", "memory"])
def test_shares_without_free_memory_are_refused(monkeypatch, split):
    def device_of(comm, *_):
        return SimpleNamespace(weights_room=lambda: (f"GPU {comm.rank}", 500 * (1 - comm.rank)), is_gpu=True)

    monkeypatch.setattr(load, "device_of", device_of)
    options = SimpleNamespace(split=split, dtype="auto", verbose=False)
    with pytest.raises(AgreedError, match=f"--split {split}: rank 1 has no free memory"):
        run_threads(2, lambda comm: load.split_by_devices(comm, None, options))
