"""Batches: a sequence gets the same logits together with others as on its own."""

import numpy as np
import pytest
from tiny import write_tiny

from minitp.comm import run_threads
from minitp.device import open_device
from minitp.load import load_model
from minitp.loading.source import open_model

# Tolerance relative to the largest logit. BLAS sums a product of many rows in another order than one of few
# rows, and the sums of at most 48 terms in each of the 2 layers may differ by some units of 2^-24.
TOLERANCE = 1e-5

PROMPTS = [[1, 2, 3], [4], [200, 7, 7, 9, 30, 31, 8], [5, 6]]
SHAPES = {
    "plain": {},
    "window": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4},
    "windows": {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "sliding_window": 4,
        "head_dim": 8,
    },
    "experts": {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "uneven": {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48},
}


def logits_of(source, tp, batches):
    """Return rank 0's logits for each batch, a list of (sequence number, tokens)."""

    def rank(comm):
        model = load_model(source, comm, open_device("float32"))
        caches = [model.new_cache() for _ in PROMPTS]
        return [
            model.forward_batch([(tokens, caches[n]) for n, tokens in parts], logits_at=slice(None))
            for parts in batches
        ]

    return run_threads(tp, rank)[0]


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_batched_logits_equal_those_of_single_sequences(tmp_path, shape, tp):
    """Compare a batch of prompts, a batch of decoding sequences, and a batch of both."""
    source = open_model(str(write_tiny(tmp_path, **SHAPES[shape])), tp)
    batches = [
        list(enumerate(PROMPTS)),
        [(n, [n + 10]) for n in range(4)],
        [(3, [40]), (0, [50, 51, 52]), (2, [60])],
    ]
    rows = [np.split(logits, np.cumsum([len(tokens) for _, tokens in parts])[:-1])
            for parts, logits in zip(batches, logits_of(source, tp, batches), strict=True)]  # fmt: skip
    alone = logits_of(source, tp, [[part] for parts in batches for part in parts])
    together = [logits for batch in rows for logits in batch]
    assert [x.shape for x in together] == [x.shape for x in alone]
    for logits, expected in zip(together, alone, strict=True):
        np.testing.assert_allclose(logits, expected, rtol=TOLERANCE, atol=TOLERANCE * np.abs(expected).max())
