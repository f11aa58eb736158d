"""The modules of mlx-lm, and the steps that their inputs and outputs are, by model_type.

Read in mlx-lm 0.32.2 (mlx_lm/models/). Except in mixtures of experts, its modules have the same paths as in
Hugging Face transformers. Rotated queries and keys are outputs of the module `self_attn.rope`, which is
called for both in turn; the cache is what `update_and_fetch` of a KVCache returns; see `probe.mlx`.
"""

from minitp.mapping.table import out
from minitp.mapping.transformers import LAYERS, TRANSFORMERS


def experts(block):
    """Return the steps of a mixture's block, whose router is called `gate`."""
    return {f"{LAYERS}.{block}.gate": [out("mlp.router", "1 T E")], f"{LAYERS}.{block}": [out("mlp.out")]}


# Steps that mlx-lm rounds to a smaller dtype than the model's, by model_type.
ROUNDINGS = {"gemma3_text": {"embed": "bfloat16"}}  # the root of the hidden size
MLX = TRANSFORMERS | {
    "mixtral": TRANSFORMERS["llama"] | experts("block_sparse_moe"),
    "qwen3_moe": TRANSFORMERS["qwen3"] | experts("mlp"),
}
