"""Record Hugging Face transformers with `minitp.probe` on the models in tests/goldens, for the tests.

    pip install torch==2.13.0 transformers==5.23.0 .      (CPU; the versions of the committed files)
    python tests/support/make_probe_dumps.py [NAME ..]

Each file has a prompt of five tokens and a decoded one: in bfloat16 for tinyllama, in float32 for the others.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import minitp.probe

TESTS = Path(__file__).resolve().parents[1]
PROMPT = [3, 50, 7, 7, 91]
NAMES = [
    "llama2",
    "tinyllama",
    "mistral-v01",
    "qwen2",
    "qwen3",
    "smollm3",
    "gemma2",
    "gemma3",
    "granite",
    "mixtral",
    "qwen3-moe",
    "phi3",
]

for name in sys.argv[1:] or NAMES:
    dtype = torch.bfloat16 if name == "tinyllama" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        TESTS / "goldens" / name, dtype=dtype, experts_implementation="eager"
    ).eval()
    model.config._name_or_path = name
    path = TESTS / "support" / "probed" / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    with torch.no_grad(), minitp.probe.record(model, path):
        output = model(torch.tensor([PROMPT]), use_cache=True)
        token = output.logits[0, -1].argmax()[None, None]
        model(token, past_key_values=output.past_key_values, use_cache=True)
    print(path)
