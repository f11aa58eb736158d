"""Record Hugging Face transformers in 16 bits, right and with a fault in it, for the tests of `minitp judge`.

    pip install torch==2.13.0 transformers==5.23.0 .      (CPU; the versions of the committed files)
    python tests/support/make_16_bit_recordings.py

The faults are those of make_faulty_recordings. Under `autocast`, a model in float32 has products in bfloat16.
"""

from contextlib import nullcontext

import make_faulty_recordings as faulty
import torch
from transformers import AutoModelForCausalLM

import minitp.probe

FOLDER = faulty.TESTS / "support" / "recordings_16_bit"
BF16, F16 = torch.bfloat16, torch.float16
RIGHT = {
    "gemma2-bfloat16": ("gemma2", BF16),
    "qwen3-float16": ("qwen3", F16),
    "granite-bfloat16": ("granite", BF16),
    "llama2-autocast": ("llama2", torch.float32),
}
WRONG = ("gelu", "tiled heads", "rope in pairs", "gate is up", "unscaled", "layer norm", "tied")


def write(name, golden, dtype, fault=lambda model: None):
    """Record a golden model with a fault."""
    model = AutoModelForCausalLM.from_pretrained(faulty.TESTS / "goldens" / golden, dtype=dtype).eval()
    model.config._name_or_path = golden
    model.set_attn_implementation("eager")
    fault(model)
    path = FOLDER / f"{name}.safetensors"
    context = torch.autocast("cpu", BF16) if name.endswith("autocast") else nullcontext()
    with torch.no_grad(), context, minitp.probe.record(model, path):
        model(torch.tensor([faulty.PROMPT]), use_cache=True)
    for module, function, original in faulty.PATCHED:
        setattr(module, function, original)
    print(path)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, (golden, dtype) in RIGHT.items():
        write(name, golden, dtype)
    for name in WRONG:
        golden, fault, *_ = faulty.FAULTS[name]
        write(f"{name.replace(' ', '-')}-bfloat16", golden, BF16, fault)
