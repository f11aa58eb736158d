"""Models without a file: the true shapes of known models, with weights drawn from a counter-based generator.

Each weight is a function of the seed, its tensor's name and its position in the tensor. So a rank draws only
its slice, the oracle draws the whole tensor, and both get the same numbers.
"""

import hashlib

import numpy as np

from minitp.errors import InputError

_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
_MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_act": "silu"}
_MIXTRAL = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_act": "silu"}

# config.json of the models whose shapes are available as `random:NAME`.
MODELS = {
    "mistral-7b": _MISTRAL
    | dict(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
    | dict(num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=32768)
    | dict(rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=4096, torch_dtype="bfloat16"),
    "llama-3-8b": _LLAMA
    | dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
    | dict(num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192)
    | dict(rms_norm_eps=1e-5, rope_theta=500000.0, torch_dtype="bfloat16"),
    "mixtral-8x7b": _MIXTRAL
    | dict(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
    | dict(num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=32768)
    | dict(num_local_experts=8, num_experts_per_tok=2)
    | dict(rms_norm_eps=1e-5, rope_theta=1000000.0, torch_dtype="bfloat16"),
    "tinyllama-1.1b": _LLAMA
    | dict(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22)
    | dict(num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048)
    | dict(rms_norm_eps=1e-5, rope_theta=10000.0, torch_dtype="bfloat16"),
    "smollm2-135m": _LLAMA
    | dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30)
    | dict(num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192)
    | dict(rms_norm_eps=1e-5, rope_theta=100000.0, tie_word_embeddings=True, torch_dtype="bfloat16"),
}

PER_COUNT = 16  # weights per value of Philox's counter: 256 bits, 16 for each weight
BLOCK = 1 << 20  # weights drawn at a time


def random_config(name):
    """Return the config.json fields of `random:name`, or raise an InputError that lists the choices."""
    if name not in MODELS:
        raise InputError(f"--model random:{name}: unknown model; choose from " + ", ".join(MODELS))
    return dict(MODELS[name])


class RandomWeights:
    """A stand-in for a Checkpoint whose `read` draws random weights.

    Matrices are uniform with variance 1 / in (embeddings: 1 / D), norm weights near one, biases near zero.

    Parameters
    ----------
    shapes : dict of str to tuple
        The full shape of each tensor, by its name in a checkpoint.
    seed : int
    """

    def __init__(self, shapes, seed=0):
        self.shapes = shapes
        self.seed = seed

    def read(self, name, index):
        """Draw the slice `index` (a tuple of slices) of tensor `name`, in float32."""
        shape = self.shapes[name]
        columns = shape[-1]
        rows = index[0] if len(shape) == 2 else slice(0, 1)
        wide = -(-columns // PER_COUNT) * PER_COUNT  # each row starts at a new counter value
        out = np.empty((rows.stop - rows.start, index[-1].stop - index[-1].start), np.float32)
        size = max(1, BLOCK // wide)  # rows per block
        for start in range(rows.start, rows.stop, size):
            stop = min(start + size, rows.stop)
            drawn = self._draw(name, start * wide, (stop - start) * wide).reshape(stop - start, wide)
            out[start - rows.start : stop - rows.start] = drawn[:, index[-1]]
        out -= 32767.5
        if len(shape) == 2:
            out *= np.float32(12**0.5 / 65536 / columns**0.5)  # 65536 / sqrt(12): the std of the draws
            return out
        out *= np.float32(0.2 / 65536)
        return out[0] + 1 if name.endswith("norm.weight") else out[0]

    def read_into(self, name, index, out):
        """Write the slice `index` of a tensor into `out`, like Checkpoint.read_into."""
        out[...] = self.read(name, index)

    def _draw(self, name, first, count):
        """Return `count` weights of a tensor from index `first` on, as uint16; both are multiples of 16."""
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        key = [int.from_bytes(digest[i : i + 8], "little") for i in (0, 8)]
        philox = np.random.Philox(key=key, counter=first // PER_COUNT)
        return philox.random_raw(count // 4).astype("<u8", copy=False).view("<u2")
