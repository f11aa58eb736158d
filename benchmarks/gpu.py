"""Everything that a machine with a GPU can say about minitp, in less than eight minutes.

    ./run.sh gpu          or, with packages that are already there: MINITP_PYTHON=python3 ./run.sh gpu

First what must be right: the tests that need a GPU, the tests of kernels run there, `check` on the demo model
and on two layers in Mistral 7B's shapes, NCCL with one rank, four ranks that share the GPU. Then what is
measured, one thing at a time: decoding and a prompt in Mistral 7B's shapes, one rank's share of TP=4 alone,
loading from a file, and transformers on the same card. Each step is a process with a time limit; if it fails,
the others go on. A table comes last, and benchmarks/results/<gpu>-<date>.json has everything.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

from gpu_parts import PARTS
from gpu_steps import Step, last_words, run_group

from minitp.cuda.gpu import find_cupy
from minitp.errors import MinitpError, one_line
from minitp.job import find_mpirun
from minitp.table import aligned

ROOT = Path(__file__).resolve().parent.parent
TOTAL_S = 465.0  # for all steps together
FETCH_S = 40
MODEL = "random:mistral-7b"
ON_GPU = ("tests/test_gpu.py", "tests/test_gpu_kernels.py")
KERNEL_TESTS = (
    "linear",
    "attention_decode",
    "attention_prefill",
    "begin_step",
    "rms_norm",
    "sample",
    "swiglu",
)
CONTEXT, NEW_TOKENS, PROMPT = 512, 128, 2048
# Of an all-reduce of 8 KiB over NVLink, TP=4 on H100s, in one kernel: reported in sglang's pull request 2904.
PUBLISHED_US = (3.7, 4.8)


def main():
    """Run all steps; 1 if one failed."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # this process is a step
    args = arguments.parse_args()
    if args.part:
        PARTS[args.part]()
        return 0
    try:
        facts = surroundings(find_cupy())
    except MinitpError as error:
        print(f"minitp: {error}", file=sys.stderr)
        return error.exit_code
    deadline = time.monotonic() + TOTAL_S
    outcomes = run_group(checks(), deadline, together=True)
    outcomes += run_group(measurements(), deadline)
    path = write(facts, outcomes)
    print("\n".join(["", *table(facts, outcomes), f"written: {path}"]))
    return 1 if any(one["status"] == "failed" for one in outcomes) else 0


def surroundings(cupy):
    """On what all this runs."""
    runtime, versions = cupy.cuda.runtime, {}
    for name in ("numpy", "ml_dtypes", "torch", "transformers", "mpi4py"):
        if importlib.util.find_spec(name) is not None:
            versions[name] = importlib.metadata.version(name)
    return {
        "gpu": runtime.getDeviceProperties(0)["name"].decode(),
        "gpus": runtime.getDeviceCount(),
        "cuda_driver": runtime.driverGetVersion(),
        "cuda_runtime": runtime.runtimeGetVersion(),
        "python": sys.version.split()[0],
        "versions": {"cupy": cupy.__version__, **versions},
        "date": date.today().isoformat(),
    }


# --- the steps ------------------------------------------------------------------------------------------


def minitp(*argv):
    return [sys.executable, "-m", "minitp", *map(str, argv), "--device", "cuda"]


def this(part):
    return [sys.executable, __file__, "--part", part]


def missing(*modules):
    """A function that says which of these modules is missing, or None."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return lambda: f"{' and '.join(absent)} not installed" if absent else None


def no_mpirun():
    """Why several ranks cannot be started here, or None."""
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py not installed"
    try:
        find_mpirun()
    except MinitpError as error:
        return one_line(error)
    return None


def no_demo():
    """Why the demo model cannot be had, or None; it is fetched if it can."""
    fetch = [sys.executable, "-c", "from minitp.demo import demo_directory; demo_directory()"]
    try:
        done = subprocess.run(fetch, cwd=ROOT, capture_output=True, text=True, timeout=FETCH_S)
    except subprocess.TimeoutExpired:
        return f"the demo model was not to be had in {FETCH_S} s"
    return f"the demo model cannot be had: {last_words(done.stderr, 100)}" if done.returncode else None


def checks():
    """What must be right; these run at the same time, for nothing is timed."""
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    kernels = [f"tests/test_cuda_{name}.py" for name in KERNEL_TESTS]
    wanted = [
        Step("tests that need a GPU", [*tests, "-m", "gpu", *ON_GPU], 200, missing("pytest")),
        Step("tests of kernels", [*tests, "-p", "kernels_on_gpu", *kernels], 200, missing("pytest")),
        Step("NCCL, one rank", this("nccl"), 60),
    ]
    ids = ["--tokens", "1,2,3,4,5,6,7", "--decode", 2]
    for path, dtype in (("explicit", "float16"), ("fused", "float16")):
        command = minitp("check", "The capital of France is", "--tp", 1, "--path", path, "--dtype", dtype)
        wanted.append(Step(f"check demo, {path}, {dtype}", command, 150, no_demo))
    for path, dtype in [(p, d) for d in ("bfloat16", "float16") for p in ("explicit", "fused")] + [
        ("explicit", "float32")
    ]:
        command = minitp("check", *ids, "--model", MODEL, "--layers", 2, "--tp", 1, "--path", path)
        wanted.append(Step(f"check Mistral 7B, {path}, {dtype}", [*command, "--dtype", dtype], 200))
    shared = ["--model", "random:smollm2-135m", "--layers", 4, "--tp", 4, "--share-gpu"]
    for transport in ("nccl", "mpi"):
        command = minitp("check", *ids, *shared, "--path", "fused", "--comm", transport)
        wanted.append(Step(f"four ranks on one GPU, {transport}", command, 150, no_mpirun))
    return wanted


def measurements():
    """What is timed, one after another, the most wanted first."""
    decode = ["--prompt-tokens", CONTEXT - NEW_TOKENS // 2, "-n", NEW_TOKENS, "--rounds", 5, "--profile"]
    bench = ["bench", "--json", "--model", MODEL, "--dtype", "bfloat16"]
    share = [*bench, "--as-rank", 0, "--of", 4]
    return [
        Step("decode", minitp(*bench, "--tp", 1, *decode), 80),
        Step("prefill", minitp(*bench, "--tp", 1, "--prompt-tokens", PROMPT, "-n", 2, "--rounds", 5), 60),
        Step("rank 0 of 4, decode", minitp(*share, *decode), 60),
        Step("loading", this("loading"), 60),
        Step("transformers", peers(), 170, missing("torch", "transformers")),
    ]


def peers():
    sizes = ["--context", CONTEXT, "--new-tokens", NEW_TOKENS, "--prompt", PROMPT]
    return [sys.executable, str(Path(__file__).with_name("gpu_peers.py")), *map(str, sizes)]


# --- what comes of them ---------------------------------------------------------------------------------


def write(facts, outcomes, folder=ROOT / "benchmarks" / "results"):
    """The JSON file; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "-".join(facts["gpu"].lower().split())
    path = folder / f"{name}-{facts['date']}.json"
    path.write_text(json.dumps(facts | {"steps": outcomes}, indent=1) + "\n")
    return os.path.relpath(path)


def table(facts, outcomes):
    """All of it, as lines: what is right, then what was measured."""
    found = {one["name"]: one["result"] for one in outcomes if one["status"] == "ok" and one["result"]}
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    rows = [
        (one["name"], one["status"], f"{one['seconds']:.0f} s", "" if one["result"] else one["said"])
        for one in outcomes
    ]
    lines = [f"{facts['gpu']}, {facts['date']}; {versions}", "", *aligned(rows, "<<><")]
    figures = [row for name, tell in FIGURES.items() if name in found for row in tell(found[name], found)]
    if figures:
        lines += ["", *aligned([("", "", "share"), *figures], "<<<")]
    return [line[:160] for line in lines]


def of_decode(result, _):
    limits, decode = result["limits"], result["decode"]
    graph_s = result["profile"]["graph_us"] / 1e6
    of_graph = decode["bytes_per_token"] / graph_s / 1e9 / limits["copy_gb_per_s"]
    launches = result["profile"]["launches"]
    return [
        ("copy on the GPU, read and written", f"{limits['copy_gb_per_s']:.0f} GB/s", ""),
        (f"decode, context {CONTEXT}, one GPU", *speed(decode)),
        (f"  its graph alone, {launches} launches", f"{1e3 * graph_s:.2f} ms", f"{of_graph:.1%} of the copy"),
    ]


def speed(decode):
    """Tokens a second, and the share of the copy's bandwidth."""
    share = decode["share_of_copy"]["median"]
    return f"{decode['tokens_per_s']['median']:.1f} tokens/s", f"{share:.1%} of the copy"


def of_prefill(result, _):
    prefill, rate = result["prefill"], result["limits"]["matrix_gflop_per_s"]
    share = f"{prefill['share_of_matrix_rate']['median']:.1%} of the matrix rate"
    rows = [("cuBLAS, 16 bits, the prompt's shapes", f"{rate / 1e3:.0f} TFLOP/s", "")]
    tokens = f"{prefill['tokens_per_s']['median']:.0f} tokens/s"
    return [*rows, (f"prompt of {prefill['prompt_tokens']} tokens, one GPU", tokens, share)]


def of_share(result, _):
    """One rank's time, and with the all-reduces of a token as others have measured one."""
    reductions, own_s = 2 * result["layers"] + 1, 1 / result["decode"]["tokens_per_s"]["median"]
    least, most = (1 / (own_s + reductions * us / 1e6) for us in reversed(PUBLISHED_US))
    published = f"{PUBLISHED_US[0]} to {PUBLISHED_US[1]} us published for each"
    return [
        ("decode, rank 0's share of TP=4 alone", *speed(result["decode"])),
        (f"  with {reductions} all-reduces, not run here", f"{least:.0f} to {most:.0f} tokens/s", published),
    ]


def of_loading(result, _):
    found = result["loading"]
    share = found["gb_per_s"] / found["file_gb_per_s"]
    return [("loading from a file", f"{found['gb_per_s']:.1f} GB/s", f"{share:.0%} of reading that file")]


def of_transformers(result, found):
    rows = []
    for name, ours in (("decode", "decode"), ("prefill", "prefill")):
        theirs = result[f"{name}_tokens_per_s"]
        beside = ""
        if ours in found:
            beside = f"minitp is {found[ours][name]['tokens_per_s']['median'] / theirs:.2f} times as fast"
        compiled = "static cache, torch.compile" if name == "decode" else "eager"
        rows.append((f"transformers {name}, {compiled}", f"{theirs:.1f} tokens/s", beside))
    return rows


FIGURES = {
    "decode": of_decode,
    "prefill": of_prefill,
    "rank 0 of 4, decode": of_share,
    "loading": of_loading,
    "transformers": of_transformers,
}

if __name__ == "__main__":
    sys.exit(main())
