"""The tasks of benchmarks/gpu/run.py: checks, measurements, and peers for comparison."""

import importlib.util
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

from goals import LONG_KEYS, PROMPTS, REQUESTS, ROWS
from tasks import Task

from minitp.errors import MinitpError, one_line
from minitp.launch.mpirun import find_mpirun
from minitp.loading.demo import NAME, cache_directory

MODEL = "random:mistral-7b"
GPU_TESTS = ("real_gpu", "real_gpu_kernels", "real_gpu_tensor_cores")
# Tests of kernels, which run on the CPU by default and on the GPU in this benchmark. Tests of all_reduce
# share the host's memory with forked processes, so they cannot run on a GPU; ipc.py replaces them.
KERNEL_TESTS = (
    "linear",
    "attention_decode",
    "attention_prefill",
    "begin_decode",
    "family_options",
    "experts",
    "read_memory",
    "rms_norm",
    "sample",
    "swiglu",
)
GOLDENS = (("explicit", "float32"), ("explicit", "bfloat16"), ("fused", "bfloat16"), ("fused", "float16"))
IN_16_BITS = [(path, dtype) for dtype in ("bfloat16", "float16") for path in ("explicit", "fused")]
CONTEXT, NEW_TOKENS, PROMPT = 512, 128, 2048
Check = partial(Task, required=True)
LONG = ("--model", "random:llama-3-8b", "--layers", 8, "--keys", LONG_KEYS)
FOLDER = Path(tempfile.gettempdir()) / f"minitp-gpu-model-{os.getpid()}"  # written by one task, read by two


def checks():
    """Return the checks, the longest first. They run at the same time, because nothing is timed."""
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    kernels = [f"tests/rooms/cuda/test_{name}.py" for name in KERNEL_TESTS]
    on_gpu = [f"tests/system/test_{name}.py" for name in GPU_TESTS]
    tasks = [
        Check("tests of kernels", [*tests, "-p", "kernels_on_gpu", *kernels], 150, missing("pytest")),
        Check("tests that need a GPU", [*tests, "-s", "-m", "gpu", *on_gpu], 150, missing("pytest")),
    ]
    ids = ["--tokens", "1,2,3,4,5,6,7", "--decode", 2]
    for path, dtype in [*IN_16_BITS, ("explicit", "float32")]:
        command = minitp("check", *ids, "--model", MODEL, "--layers", 2, "--tp", 1, "--path", path)
        tasks.append(Check(f"check Mistral 7B, {path}, {dtype}", [*command, "--dtype", dtype], 150))
    for path, dtype in GOLDENS:
        command = script("parts.py", "goldens", path, dtype)
        tasks.append(Check(f"check every family, {path}, {dtype}", command, 150))
    for path in ("explicit", "fused"):
        command = minitp("check", "The capital of France is", "--tp", 1, "--path", path, "--dtype", "float16")
        tasks.append(Check(f"check demo, {path}, float16", command, 120, no_demo))
    shared = ["--model", "random:smollm2-135m", "--layers", 4, "--tp", 4, "--share-gpu"]
    for transport, reason in (("nccl", no_shared_nccl), ("mpi", no_mpirun)):
        command = minitp("check", *ids, *shared, "--path", "fused", "--comm", transport)
        tasks.append(Check(f"four ranks on one GPU, {transport}", command, 120, reason))
    tasks.append(Check("four processes on one GPU, peer memory", script("ipc.py"), 60))
    tasks.append(Check("NCCL, one rank", script("parts.py", "nccl"), 60))
    return tasks


def measurements():
    """Return the measurements, the most important first. They run one after another.

    Those of the goals come before the others, because what does not fit into the time is skipped.
    """
    decode = ["--prompt-tokens", CONTEXT - NEW_TOKENS // 2, "-n", NEW_TOKENS, "--rounds", 5, "--profile"]
    bench = ["bench", "--json", "--model", MODEL, "--dtype", "bfloat16"]
    one, share = [*bench, "--tp", 1], [*bench, "--as-rank", 0, "--of", 4]
    few = ["--prompt-tokens", CONTEXT, "-n", 16, "--rounds", 5]
    batches = ["--sweep", "batch", "--prompt-tokens", CONTEXT - 16, "-n", 16, "--rounds", 1]
    requests = ["--requests", 16, "--prompt-tokens", 64, "-n", 64, "--rounds", 2]
    return [
        Task("decode", minitp(*one, *decode), 80, least_s=20),
        Task("graphs, TP=1", graphs("--rows", listed(ROWS), "--kernels", "1,8,64"), 60, least_s=15),
        Task("graphs, rank 0 of 4", graphs("--of", 4, "--kernels", "1,8,64"), 50, least_s=10),
        Task(f"attention, {LONG_KEYS} keys", graphs(*LONG, "--kernels", 1), 40, least_s=10),
        *(prompt(one, tokens) for tokens in PROMPTS),
        *(Task(f"engine, {n} requests", script("serving.py", "engine", n), 60, least_s=15) for n in REQUESTS),
        Task("model file", script("parts.py", "write", FOLDER), 60, least_s=20),
        Task("loading", script("parts.py", "loading", FOLDER), 60, least_s=20),
        Task("serve", script("serving.py", "serve", FOLDER, *REQUESTS), 80, no_server, least_s=30),
        Task("rank 0 of 4, decode", minitp(*share, *decode), 60, least_s=10),
        Task("16 tokens", minitp(*one, *few), 60, least_s=20),
        Task("batches", minitp(*one, *batches), 60, least_s=20),
        Task("16 requests", minitp(*one, *requests), 60, least_s=20),
    ]


def prompt(bench, tokens):
    """Return the task that measures a prompt."""
    name = "prefill" if tokens == PROMPT else f"prompt of {tokens}"
    sizes = ["--prompt-tokens", tokens, "-n", 2, "--rounds", 5]
    return Task(name, minitp(*bench, *sizes), 60, least_s=15)


def graphs(*argv):
    return script("graphs.py", "--keys", CONTEXT, *argv)


def listed(values):
    return ",".join(map(str, values))


def peers():
    """Return the measurements of other engines that compute the same."""
    sizes = ["--context", CONTEXT, "--new-tokens", NEW_TOKENS, "--prompt", PROMPT]
    command = script("peers.py", *sizes)
    return [Task("transformers", command, 170, missing("torch", "transformers"), least_s=60)]


def minitp(*argv):
    return [sys.executable, "-m", "minitp", *map(str, argv), "--device", "cuda"]


def script(name, *argv):
    return [sys.executable, str(Path(__file__).with_name(name)), *map(str, argv)]


# --- reasons to skip a task -----------------------------------------------------------------------------


def missing(*modules):
    """Return a function whose result says which of these modules are missing, or is None."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return lambda: f"{' and '.join(absent)} not installed" if absent else None


def no_mpirun():
    """Return why several ranks cannot be started on this machine, or None."""
    try:
        find_mpirun()
    except MinitpError:
        return "no mpirun found; MINITP_MPICH=WHEEL provides one, see docs/troubleshooting.md"
    return missing("mpi4py")()


def no_shared_nccl():
    """Return why several ranks cannot share a GPU through NCCL on this machine, or None."""
    from minitp.cuda.nccl import SHARES_GPUS, load_nccl

    try:
        version = load_nccl().get_version()
    except MinitpError as error:
        return one_line(error)
    if version < SHARES_GPUS:
        return f"NCCL {version} does not let several ranks share a GPU; {SHARES_GPUS} and later do"
    return no_mpirun()


def no_server():
    """Return why `minitp serve` cannot run on this machine, or None."""
    return missing("starlette", "uvicorn", "prometheus_client")()


def no_demo():
    """Return why the demo model cannot be used, or None. Nothing is downloaded."""
    if (cache_directory() / NAME).is_dir():
        return None
    without = missing("gguf")()
    return f"the demo model is not in {cache_directory()}" + (f", and {without}" if without else "")
