"""The explanations of mistakes that NumPy makes in one array of a right recording."""

import json

import ml_dtypes
import numpy as np
import pytest
from paths import GOLDENS, PROBED
from safetensors import safe_open
from safetensors.numpy import save_file

from minitp.judge.files import RecordedFiles
from minitp.judge.recording import EngineRecording
from minitp.judge.run import judge
from minitp.loading.source import open_model
from minitp.trace.reference import open_oracle


class Layer:
    """The arrays of a layer in a right recording, and the checkpoint's tensors.

    Parameters
    ----------
    golden : str
    layer : int or None
        None for the arrays after the layers.
    pass_name : str
    """

    def __init__(self, golden, layer, pass_name):
        self.source, self.path = open_model(str(GOLDENS / golden), 1), PROBED / f"{golden}.safetensors"
        self.oracle, self.layer, self.pass_name = open_oracle(self.source), layer, pass_name
        self.config = json.loads((GOLDENS / golden / "config.json").read_text())
        with safe_open(self.path, "np") as file:
            self.arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.metadata = file.metadata()

    def name(self, step, layer=None):
        layer = self.layer if layer is None else layer
        return f"{self.pass_name}/" + (step if layer is None else f"layers.{layer}.{step}")

    def s(self, step, layer=None):
        """Return a step in float64."""
        return self.arrays[self.name(step, layer)].astype(np.float64)

    def outside(self, step):
        """Return a step outside the layers in float64."""
        return self.arrays[f"{self.pass_name}/{step}"].astype(np.float64)

    def w(self, name):
        """Return a tensor of the layer, or if it has none, of the whole model, in float64."""
        whole = name.startswith(("model.", "lm_head.")) or self.layer is None
        return self.oracle.tensor(name if whole else f"model.layers.{self.layer}.{name}").astype(np.float64)

    def keys(self, kv_of_head=None):
        """Return the keys of each query head, [H, S, d]."""
        cache, heads = self.s("attn.k_cache"), len(self.s("attn.q_rope"))
        return cache[[h // (heads // len(cache)) for h in range(heads)] if kv_of_head is None else kv_of_head]

    def scores(self, scale=None, keys=None):
        """Return scores without a mask, [H, T, S]."""
        q, k = self.s("attn.q_rope"), self.keys() if keys is None else keys
        return (scale or 1 / self.oracle.score_root) * q @ k.swapaxes(1, 2)

    def probs(self, scores=None, mask=None):
        """Return the softmax of masked scores, [H, T, S]."""
        scores = self.scores() if scores is None else scores
        mask = np.tril(np.ones(scores.shape[1:], bool)) if mask is None else mask
        terms = np.where(mask, np.exp(scores), 0)  # [H, T, S]
        return terms / terms.sum(axis=-1, keepdims=True)

    def rope(self, x, frequencies=None, positions=None, pairs=None):
        """Rotate the first 2 * pairs dimensions of x, [n, T, d]."""
        frequencies = self.oracle.rotations[self.layer][0] if frequencies is None else frequencies
        positions = np.arange(x.shape[1]) if positions is None else positions
        n = len(frequencies) if pairs is None else pairs
        angles = np.outer(positions, frequencies[:n])
        a, b, rest = np.split(x, [n, 2 * n], axis=-1)
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate((a * cos - b * sin, b * cos + a * sin, rest), axis=-1)

    def norm(self, x, weight, eps=None):
        eps = self.oracle.eps if eps is None else eps
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight

    def heads(self, flat, like="attn.q"):
        return np.stack(np.split(flat, len(self.s(like)), axis=-1))  # [n, T, d]

    def explained(self, step, array, tmp_path):
        """Return the blamed step and the explanation for a recording with another array."""
        arrays = self.arrays | {self.name(step): array.astype(np.float32)}
        save_file(arrays, tmp_path / "changed.safetensors", self.metadata)
        recording = EngineRecording(RecordedFiles(tmp_path / "changed.safetensors"), self.source)
        judgement = judge(recording, self.oracle)
        blamed = judgement.result.blamed()
        return blamed[0].name if blamed else None, judgement.explanation


def silu(x):
    return x / (1 + np.exp(-x))


def bfloat16(x):
    return x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def half_of_dimensions(m):
    return m.rope(m.s("attn.q_norm"), pairs=m.oracle.head_dim // 4)


def exchanged_heads(m):
    q = m.s("attn.q")
    q[[1, 2]] = q[[2, 1]]
    return q


def interleaved_rows(m):
    joined = np.stack((m.w("mlp.gate_proj.weight"), m.w("mlp.up_proj.weight")), axis=1)  # [F, 2, D]
    return m.s("mlp.norm") @ joined.reshape(-1, joined.shape[-1])[: joined.shape[0]].T


def every_second_row(m):
    joined = np.concatenate((m.w("mlp.gate_proj.weight"), m.w("mlp.up_proj.weight")))  # [2 F, D]
    return m.s("mlp.norm") @ joined[0::2].T


def dropout(m):
    probs = m.probs()
    kept = np.random.default_rng(1).random(probs.shape) > 0.3
    return np.where(kept, probs / 0.7, 0)


def nan_row(m):
    y = m.s("mlp.out")
    y[:, 3] = np.nan
    return y


def all_heads(m):
    q, weight = m.s("attn.q"), m.w("self_attn.q_norm.weight")
    return q / np.sqrt(np.mean(q * q, axis=(0, 2), keepdims=True) + m.oracle.eps) * weight


def first_key_alone(m):
    mask = np.tril(np.ones(m.scores().shape[1:], bool), -1)
    mask[0, 0] = True
    return m.probs(mask=mask)


def over_queries(m):
    scores = np.where(np.tril(np.ones(m.scores().shape[1:], bool)), np.exp(m.scores()), 0)
    return scores / scores.sum(axis=1, keepdims=True)


def mixture(m, shares, scales_input=False):
    """Return the output of the experts of Mixtral with shares [T, E]: [T, D]."""
    x, total = m.s("mlp.norm"), 0
    for e, share in enumerate(shares.T[:, :, None]):
        gate, down, up = (m.w(f"block_sparse_moe.experts.{e}.w{i}.weight") for i in (1, 2, 3))
        inputs = share * x if scales_input else x
        y = (silu(inputs @ gate.T) * (inputs @ up.T)) @ down.T
        total = total + (y if scales_input else share * y)
    return total


def shares_of(m, chosen=None, count=2):
    """Return the normalized shares of the experts with the largest logits, or of the chosen ones, [T, E]."""
    terms = np.exp(m.s("mlp.router"))  # [T, E]
    if chosen is None:
        chosen = np.argsort(np.argsort(-terms, axis=-1), axis=-1) < count
    return np.where(chosen, terms, 0) / np.where(chosen, terms, 0).sum(axis=-1, keepdims=True)


def last_experts(m):
    shares, order = shares_of(m), np.argsort(-m.s("mlp.router"), axis=-1)[:, :2]
    same = np.zeros_like(shares)
    same[:, order[-1]] = np.take_along_axis(shares, order, axis=-1)
    return mixture(m, same)


def smallest_shares(m):
    router = m.s("mlp.router")
    return mixture(m, shares_of(m, np.argsort(np.argsort(router, axis=-1), axis=-1) < 2))


def two_tokens_per_expert(m):
    shares = shares_of(m)
    return mixture(m, np.where(np.cumsum(shares > 0, axis=0) <= 2, shares, 0))


def without_attention(m):
    return m.s("mlp.residual", m.layer - 1) + m.s("mlp.out")


# golden, layer, step, the array with the mistake as a function of a Layer, words of the explanation
CASES = [
    ("llama2", 0, "attn.probs", lambda m: m.probs(m.scores(6**-0.25)), "scaled by 0.638943, not by 0.408248"),
    ("llama2", 0, "attn.probs", lambda m: m.probs(m.scores(0.25)), "the scores are scaled by 0.25 (16^-0.5)"),
    ("llama2", 0, "attn.probs", first_key_alone, "does not see its own key"),
    ("llama2", 0, "attn.probs", lambda m: m.probs(np.tril(m.scores()), np.True_), "scores are 0, not -inf"),
    ("llama2", 0, "attn.probs", over_queries, "over the queries"),
    ("llama2", 0, "attn.probs", dropout, "dropout is on: "),
    ("llama2", 0, "attn.probs", lambda m: m.probs(bfloat16(m.scores())), "rounded to bfloat16: the scores"),
    ("llama2", 0, "attn.probs", lambda m: m.probs(m.scores(keys=m.keys([1, 1, 1, 0, 0, 0]))),
     "reverse order"),
    ("llama2", 0, "attn.probs", lambda m: m.probs(m.scores(keys=m.keys([0, 0, 1, 0, 1, 1]))),
     "[0, 0, 1, 0, 1, 1]"),
    ("llama2", 0, "attn.probs", lambda m: m.probs(30 * np.tanh(m.scores() / 30)),
     "a soft cap of 30, which the"),
    ("llama2", 1, "attn.norm",
     lambda m: m.norm(m.s("mlp.residual", 0), m.w("post_attention_layernorm.weight")),
     "the weight is that of post_attention_layernorm"),
    ("llama2", None, "final_norm",
     lambda m: m.norm(m.s("mlp.residual", 1), m.w("model.layers.1.input_layernorm.weight")),
     "the weight is that of layers.1.input_layernorm"),
    ("llama2", 0, "attn.norm", lambda m: bfloat16(m.s("attn.norm")), "rounded to bfloat16: the result"),
    ("llama2", 0, "attn.norm", lambda m: m.norm(bfloat16(m.outside("embed")), m.w("input_layernorm.weight")),
     "rounded to bfloat16: the input"),
    ("llama2", 0, "attn.norm", lambda m: m.norm(m.outside("embed"), m.w("input_layernorm.weight"), 3e-4),
     "eps is about 0.0003, not 1e-05"),
    ("llama2", 0, "mlp.norm", lambda m: m.norm(m.s("attn.out"), m.w("post_attention_layernorm.weight")),
     "the input is the attention's output, without the stream"),
    ("qwen3", 0, "attn.q_rope", half_of_dimensions, "only the first 6 of 12 dimensions are rotated, not all"),
    ("llama2", 0, "attn.q_rope", lambda m: m.rope(m.s("attn.q"), m.oracle.rotations[0][0] / 2),
     "divided by 2"),
    ("llama2", 0, "attn.q_rope", lambda m: m.rope(m.s("attn.q"), 3e4 ** (-np.arange(3) / 3)),
     "other ones: that of pair"),
    ("llama2", 0, "attn.q_rope", lambda m: m.rope(m.s("attn.q"), m.oracle.rotations[0][0] * 0.7),
     "0.7 times the right"),
    ("qwen3", 0, "attn.q_rope", lambda m: m.rope(m.s("attn.q_norm"), 1e4 ** (-np.arange(6) / 5)),
     "are 2i / 10, not 2i / 12"),
    ("llama2", 0, "attn.q_rope", lambda m: m.rope(m.s("attn.q"), bfloat16(m.oracle.rotations[0][0])),
     "rounded to bfloat16: the frequencies"),
    ("llama2", 0, "attn.k_rope", lambda m: m.rope(m.s("attn.k"), positions=[4, 0, 1, 2, 3]),
     "of the one before it"),
    ("llama2", 0, "attn.v", lambda m: m.rope(m.s("attn.v")), "the values are rotated, too"),
    ("llama2", 0, "attn.k_rope", lambda m: m.rope(m.s("attn.v")), "values are rotated, too, or in place of"),
    ("llama2", 0, "attn.q", exchanged_heads, "heads 1 and 2 are exchanged"),
    ("llama2", 0, "attn.out", lambda m: m.s("attn.context").reshape(5, 6, 6)[:, ::-1].reshape(5, 36)
     @ m.w("self_attn.o_proj.weight").T, "the heads of the input are in the reverse order"),
    ("llama2", 0, "mlp.gate", interleaved_rows, "gate and up are interleaved row by row"),
    ("llama2", 0, "mlp.gate", every_second_row, "but are read as if interleaved row by row"),
    ("llama2", 0, "mlp.up", lambda m: m.s("mlp.norm") @ bfloat16(m.w("mlp.up_proj.weight")).T,
     "bfloat16: the weight"),
    ("llama2", 0, "mlp.act", lambda m: m.s("mlp.up") * silu(np.minimum(m.s("mlp.gate"), 0.02)),
     "at most 0.02"),
    ("llama2", 1, "mlp.out", nan_row, "row 3 of the weight has a NaN"),
    ("llama2", 1, "mlp.residual", without_attention, "whose output is lost"),
    ("llama2", None, "logits", lambda m: np.roll(m.s("logits"), 1, axis=-1), "of the one before"),
    ("llama2", None, "logits", lambda m: 30 * np.tanh(m.s("logits") / 30),
     "the logits have a soft cap of 30"),
    ("qwen2", 0, "attn.k",
     lambda m: m.s("attn.k") + (m.w("self_attn.v_proj.bias") - m.w("self_attn.k_proj.bias")),
     "the bias is that of v"),
    ("qwen3", 0, "attn.q_norm", lambda m: m.norm(m.s("attn.q"), m.w("self_attn.k_norm.weight")),
     "that of self_attn.k_norm"),
    ("qwen3", 0, "attn.q_norm", all_heads, "over all heads"),
    ("qwen3", 0, "attn.q_norm", lambda m: m.norm(m.rope(m.s("attn.q")), m.w("self_attn.q_norm.weight")),
     "norm follows RoPE"),
    ("gemma2", 0, "attn.post_norm", lambda m: m.norm(m.outside("embed") + m.s("attn.out"),
     1 + m.w("post_attention_layernorm.weight")), "norm(x + out)"),
    ("mixtral", 0, "mlp.out", lambda m: mixture(m, shares_of(m), True), "input is scaled by its share"),
    ("mixtral", 0, "mlp.out", last_experts, "all tokens use the experts of the last token"),
    ("mixtral", 0, "mlp.out", smallest_shares, "the experts with the smallest shares"),
    ("mixtral", 0, "mlp.out", two_tokens_per_expert, "takes at most 2 tokens"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[f"{case[2]}: {case[-1]}" for case in CASES])
def test_a_mistake_is_explained(case, tmp_path):
    golden, layer, step, change, words = case
    model = Layer(golden, layer, "prefill")
    name, explanation = model.explained(step, change(model), tmp_path)
    assert name == model.name(step)
    assert words in explanation


def test_one_token_that_is_not_rotated_has_no_other_explanation(tmp_path):
    model = Layer("llama2", 0, "decode.1")
    _, explanation = model.explained("attn.q_rope", model.s("attn.q"), tmp_path)
    assert explanation == "not rotated, or the positions begin at 0 in this pass"


STEPS = (
    *("attn.norm", "attn.q", "attn.k", "attn.q_norm", "attn.q_rope", "attn.k_rope", "attn.k_cache"),
    *("attn.v_cache", "attn.probs", "attn.context", "attn.out", "attn.residual", "mlp.norm", "mlp.gate"),
    *("mlp.act", "mlp.out", "mlp.residual"),
)


@pytest.mark.parametrize("size", [1e-4, 0.3])
def test_noise_is_not_explained(size, tmp_path):
    """Check that no mistake fits an array that is wrong in another way."""
    model = Layer("qwen3", 1, "decode.1")
    for step in STEPS:
        x = model.s(step)
        noise = np.random.default_rng(0).normal(size=x.shape) * np.abs(x).mean() * size
        name, explanation = model.explained(step, x + noise, tmp_path)
        assert name == model.name(step)
        assert explanation == ""
