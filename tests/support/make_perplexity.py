"""Make perplexity_golden.json: the demo model's perplexity of perplexity_text.txt, by transformers.

    pip install torch==2.13.0 transformers==5.23.0      (CPU; the file records the versions)
    python tests/support/make_perplexity.py

The whole text is one window, computed in float32 with eager attention; the first token is not scored.
"""

import json
import math
from pathlib import Path

import tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM

from minitp.loading.demo import demo_directory

HERE = Path(__file__).parent


@torch.no_grad()
def main():
    directory = demo_directory()
    text = (HERE / "perplexity_text.txt").read_text(encoding="utf-8")
    ids = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text).ids
    model, found = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(found.values()), found  # missing, unexpected or mismatched keys
    assert len(ids) < model.config.max_position_embeddings
    logits = model.eval()(torch.tensor([ids]), use_cache=False).logits[0]  # [T, V]
    log_probs = torch.log_softmax(logits[:-1].double(), dim=-1)  # [T - 1, V]
    scored = log_probs[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]  # [T - 1]
    golden = {
        "perplexity": math.exp(-scored.mean().item()),
        "tokens": len(ids),
        "scored_tokens": len(scored),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (HERE / "perplexity_golden.json").write_text(json.dumps(golden, indent=2) + "\n")
    print(golden)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
