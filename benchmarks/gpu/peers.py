"""Measure transformers on a GPU in Mistral 7B's shapes, with a static cache and torch.compile for decoding.

    python benchmarks/gpu/peers.py [--context 512] [--new-tokens 128] [--prompt 2048]

Prints one JSON object. The weights are random and created on the GPU. The time of decoding is the difference
between a continuation of n tokens and one of two tokens, with n tokens around position `--context`.
"""

import argparse
import json
import statistics
from time import perf_counter

import torch
import transformers

from minitp.loading.random_weights import random_config

ROUNDS = 5
WARM_UP = 3  # calls in which torch compiles the model and captures graphs


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("--context", 512), ("--new-tokens", 128), ("--prompt", 2048)):
        arguments.add_argument(name, type=int, default=default)
    arguments.add_argument("--model", default="mistral-7b", help="a name as in --model random:NAME")
    arguments.add_argument("--layers", type=int)
    arguments.add_argument("--device", default="cuda")
    args = arguments.parse_args()
    fields = random_config(args.model)
    fields["num_hidden_layers"] = args.layers or fields["num_hidden_layers"]
    model = make_model(fields, args.device)
    start, token_s = args.context - args.new_tokens // 2, []
    for new_tokens in (args.new_tokens, 2) * WARM_UP:  # the longer one first, so that its cache is reused
        timed(model, start, new_tokens)
    for _ in range(ROUNDS):
        first, whole = timed(model, start, 2), timed(model, start, args.new_tokens)
        token_s.append((whole - first) / (args.new_tokens - 2))
    prefill_s = statistics.median([timed(model, args.prompt, 1) for _ in range(ROUNDS + 1)])
    result = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "layers": fields["num_hidden_layers"],
        "compiled_graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "decode_tokens_per_s": 1 / statistics.median(token_s),
        "decode_tokens_per_s_all": [1 / s for s in token_s],
        "prefill_tokens_per_s": args.prompt / prefill_s,
    }
    print(json.dumps(result))


def make_model(fields, device):
    """Return a causal language model in bfloat16 on the device, with random weights."""
    config = transformers.AutoConfig.for_model(**{k: v for k, v in fields.items() if k != "torch_dtype"})
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(default)
    model.generation_config.eos_token_id = None  # so that it never stops early
    return model.eval()


@torch.inference_mode()
def timed(model, prompt, new_tokens):
    """Return the seconds that `generate` takes, with a static cache, for which it compiles the model."""
    device = model.device
    ids = torch.randint(0, model.config.vocab_size, (1, prompt), device=device)
    options = {"max_new_tokens": new_tokens, "do_sample": False, "cache_implementation": "static"}
    synchronize(device)
    started = perf_counter()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    synchronize(device)
    seconds = perf_counter() - started
    assert out.shape[1] == prompt + new_tokens
    return seconds


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
