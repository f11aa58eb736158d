"""Compare minitp with transformers and llama.cpp: same weights, same prompt, alternating runs.

    python benchmarks/peers.py [--tp 1 2 4] [--tokens 100] [--rounds 3] [--prompt-tokens 5] [-o FILE.json]

Each run is a separate process that uses all cores of this machine. Decode speed is tokens per second after
the first one. Prefill is the time to the first token, measured within the process, after a warm-up if the
engine has one. Engines that are not installed are skipped, with a message:

- `transformers` (pip install torch transformers), float32
- `llama.cpp f32` (pip install cyllama gguf), the shipped GGUF file dequantized to float32
- `llama.cpp q4_1`, the same file as shipped: a quarter of the bytes, for comparison

minitp uses the same weights, rounded to float16, and computes in float32.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path
from time import perf_counter

from minitp.launch.run import WORKER
from minitp.loading.demo import cache_directory, demo_directory, fetch_gguf
from minitp.util.environment import cores

TEXT = [504, 3575, 282, 4649, 314]  # "The capital of France is"
NEEDS = {"transformers": ("torch", "transformers"), "llama.cpp": ("cyllama", "gguf")}


def main():
    """Run the engines in turn; print medians and ratios."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--tp", type=int, nargs="+", default=[1, 2, 4])
    arguments.add_argument("--tokens", type=int, default=100)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--prompt-tokens", type=int, default=len(TEXT))
    arguments.add_argument("-o", metavar="FILE.json")
    arguments.add_argument("--engine", help=argparse.SUPPRESS)  # makes this process a single run
    args = arguments.parse_args()
    prompt = [TEXT[i % len(TEXT)] for i in range(args.prompt_tokens)]
    if args.engine:
        print(json.dumps(ENGINES[args.engine](prompt, args.tokens)))
        return
    names = [f"minitp tp={tp}" for tp in args.tp] + installed()
    figures = {name: [] for name in names}
    for _ in range(args.rounds):
        for name, runs in figures.items():
            runs.append(measure(name, prompt, args))
    table(figures)
    if args.o:
        facts = {"date": date.today().isoformat(), "machine": platform.processor() or platform.machine()}
        facts |= {"cores": cores(), "tokens": args.tokens, "prompt_tokens": args.prompt_tokens}
        Path(args.o).write_text(json.dumps(facts | {"runs": figures}, indent=2) + "\n")


def installed():
    """Return the names of the peers that are installed."""
    found = []
    for engine in ENGINES:
        missing = [p for p in NEEDS[engine.split()[0]] if importlib.util.find_spec(p) is None]
        if missing:
            print(f"skipping {engine}: {' and '.join(missing)} not installed", file=sys.stderr)
        else:
            found.append(engine)
    return found


def measure(name, prompt, args):
    """Run an engine once; return {"decode": tokens per second, "prefill": seconds}."""
    if not name.startswith("minitp"):
        this = [sys.executable, __file__, "--engine", name, "--tokens", str(args.tokens)]
        return json.loads(run([*this, "--prompt-tokens", str(len(prompt))]).splitlines()[-1])
    ids = ",".join(map(str, prompt))
    command = [*WORKER, "generate", "--tokens", ids, "--ignore-eos", "--json"]
    stats = json.loads(run([*command, "-n", str(args.tokens), "--tp", name.split("=")[1]]))["stats"]
    return {"decode": stats["decode_tokens_per_s"], "prefill": stats["ttft_s"]}


def run(command):
    """Return a command's standard output; exit with its standard error if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command[:6])} .. failed:\n{done.stderr[-2000:]}")
    return done.stdout


def transformers(prompt, tokens):
    """Measure greedy decoding with Hugging Face transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(cores())
    model = AutoModelForCausalLM.from_pretrained(demo_directory(), dtype=torch.float32)
    seconds = []
    for n in (1, 1, tokens):  # the first warms up
        started = perf_counter()
        model.generate(torch.tensor([prompt]), max_new_tokens=n, min_new_tokens=n, do_sample=False)
        seconds.append(perf_counter() - started)
    return {"decode": (tokens - 1) / (seconds[2] - seconds[1]), "prefill": seconds[1]}


def llama_cpp(prompt, tokens, dequantized):
    """Measure greedy decoding with llama.cpp, called through its C interface."""
    from cyllama.llama import llama_cpp as native

    parameters = native.LlamaModelParams()
    parameters.n_gpu_layers = 0
    model = native.LlamaModel(str(gguf_file(dequantized)), parameters, verbose=False)
    context_parameters = native.LlamaContextParams()
    context_parameters.n_ctx = len(prompt) + tokens + 8
    context_parameters.n_batch = context_parameters.n_ubatch = max(512, len(prompt))
    context_parameters.n_threads = context_parameters.n_threads_batch = cores()
    context = native.LlamaContext(model, context_parameters, verbose=False)
    sampler = native.LlamaSampler()
    sampler.add_greedy()
    for _ in range(2):  # the first warms up
        context.kv_cache_clear()
        times, ids, past = [perf_counter()], prompt, 0
        for _ in range(tokens):
            context.decode(native.llama_batch_get_one(ids, past))
            past += len(ids)
            ids = [sampler.sample(context, -1)]
            times.append(perf_counter())
    return {"decode": (tokens - 1) / (times[-1] - times[1]), "prefill": times[1] - times[0]}


def gguf_file(dequantized):
    """Return the path of the demo model's GGUF file, which is kept next to the demo model."""
    folder = cache_directory() / "peers"
    folder.mkdir(parents=True, exist_ok=True)
    shipped, whole = folder / "model.gguf", folder / "model-f32.gguf"
    if not shipped.exists():
        fetch_gguf(folder)
    if dequantized and not whole.exists():
        dequantize(shipped, whole)
    return whole if dequantized else shipped


def dequantize(shipped, whole):
    """Write a copy of a GGUF file with all tensors in float32."""
    import gguf

    reader = gguf.GGUFReader(shipped)
    writer = gguf.GGUFWriter(whole.with_suffix(".part"), "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(whole.with_suffix(".part"), whole)


ENGINES = {
    "transformers": transformers,
    "llama.cpp f32": lambda prompt, tokens: llama_cpp(prompt, tokens, dequantized=True),
    "llama.cpp q4_1": lambda prompt, tokens: llama_cpp(prompt, tokens, dequantized=False),
}


def table(figures):
    """Print medians and ranges, and the median ratio of minitp to each peer within a round."""
    peers = [name for name in figures if not name.startswith("minitp")]
    print(f"{'':16}{'tokens/s':>9}{'min':>7}{'max':>7}{'prefill':>10}", *[f"{'/ ' + p:>17}" for p in peers])
    for name, runs in figures.items():
        speeds = [r["decode"] for r in runs]
        row = f"{name:16}{statistics.median(speeds):9.1f}{min(speeds):7.1f}{max(speeds):7.1f}"
        row += f"{statistics.median(r['prefill'] for r in runs):8.3f} s"
        for peer in peers if name not in peers else ():
            pairs = zip(runs, figures[peer], strict=True)
            row += f"{statistics.median(ours['decode'] / theirs['decode'] for ours, theirs in pairs):17.2f} x"
        print(row)


if __name__ == "__main__":
    main()
