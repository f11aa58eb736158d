"""Many requests at once: minitp beside llama.cpp, on the same float32 weights, in alternating runs.

    python benchmarks/batch_peers.py [--requests 16] [--prompt-tokens 64] [--tokens 64] [--tp 2] [--rounds 3]

Prints new tokens a second of all requests together; the time includes the prompts. llama.cpp decodes a batch
with one token of each sequence a step, as its server does with so many slots; it wants cyllama and gguf (see
peers.py).
"""

import argparse
import json
import random
import statistics
import sys
from time import perf_counter

from peers import gguf_file, run

from minitp.environment import cores


def main():
    """Run both in turn and print medians and the ratio."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--requests", type=int, default=16)
    arguments.add_argument("--prompt-tokens", type=int, default=64)
    arguments.add_argument("--tokens", type=int, default=64)
    arguments.add_argument("--tp", type=int, default=2)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--llama-cpp", action="store_true", help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.llama_cpp:
        return print(llama_cpp(args.requests, args.prompt_tokens, args.tokens))
    shape = ["--requests", str(args.requests), "--prompt-tokens", str(args.prompt_tokens)]
    bench = [sys.executable, "-m", "minitp", "bench", *shape, "-n", str(args.tokens), "--tp", str(args.tp)]
    runs = {"minitp": [], "llama.cpp f32": []}
    for _ in range(args.rounds):
        found = json.loads(run([*bench, "--rounds", "1", "--json"]))
        runs["minitp"].append(found["requests"]["together_tokens_per_s"])
        this = [sys.executable, __file__, "--llama-cpp", *shape, "--tokens", str(args.tokens)]
        runs["llama.cpp f32"].append(float(run(this).splitlines()[-1]))
    for name, values in runs.items():
        print(f"{name:14}{statistics.median(values):8.1f} tokens/s  {min(values):.1f} to {max(values):.1f}")
    ratio = statistics.median(mine / its for mine, its in zip(*runs.values(), strict=True))
    print(f"minitp / llama.cpp: {ratio:.2f}")


def llama_cpp(requests, prompt_tokens, tokens):
    """New tokens a second of so many sequences in one context."""
    from cyllama.llama import llama_cpp as native

    parameters = native.LlamaModelParams()
    parameters.n_gpu_layers = 0
    model = native.LlamaModel(str(gguf_file(dequantized=True)), parameters, verbose=False)
    context_parameters = native.LlamaContextParams()
    context_parameters.n_ctx = requests * (prompt_tokens + tokens + 8)
    context_parameters.n_batch = context_parameters.n_ubatch = 512
    context_parameters.n_seq_max = requests
    context_parameters.n_threads = context_parameters.n_threads_batch = cores()
    context = native.LlamaContext(model, context_parameters, verbose=False)
    sampler = native.LlamaSampler()
    sampler.add_greedy()
    draw = random.Random(0)
    prompts = [[draw.randrange(49152) for _ in range(prompt_tokens)] for _ in range(requests)]
    for _ in range(2):  # the first warms up
        context.kv_cache_clear()
        started = perf_counter()
        ids = prefill(native, context, sampler, prompts)
        for n in range(tokens - 1):
            batch = native.LlamaBatch(n_tokens=requests, embd=0, n_seq_max=1)
            for sequence, token in enumerate(ids):
                batch.add(token, prompt_tokens + n, [sequence], True)
            context.decode(batch)
            ids = [sampler.sample(context, row) for row in range(requests)]
        seconds = perf_counter() - started
    return requests * tokens / seconds


def prefill(native, context, sampler, prompts):
    """Run the prompts in passes of at most 512 tokens; the first new token of each."""
    together, ids = max(1, 512 // len(prompts[0])), []
    for first in range(0, len(prompts), together):
        some = prompts[first : first + together]
        batch = native.LlamaBatch(n_tokens=sum(map(len, some)), embd=0, n_seq_max=1)
        for sequence, prompt in enumerate(some, start=first):
            for position, token in enumerate(prompt):
                batch.add(token, position, [sequence], position == len(prompt) - 1)
        context.decode(batch)
        ids += [sampler.sample(context, len(prompt) * (n + 1) - 1) for n, prompt in enumerate(some)]
    return ids


if __name__ == "__main__":
    main()
