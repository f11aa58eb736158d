"""The transformer in float64 and unsharded, the reference for every other computation.

It is written from the papers' formulas and from the files that define a model (config.json and safetensors),
and in places it computes the same numbers in another way than the model under test. Its operations are in
the oracle's own `ops`, and it shares no code with the rest of the package. It is slow and simple on purpose.

    T tokens    S keys    D hidden    H query heads    K key/value heads    d head_dim
    F FFN columns    V vocabulary

Weights are [out, in], as in the checkpoint. All results are float64 for inputs of any dtype.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy, so that the safetensors library can return it
import numpy as np
from safetensors import safe_open

from minitp.oracle.families import (
    EXPERT_NAMES,
    GEMMA,
    activation,
    has_rope,
    longest_context,
    parts_of_joined,
    rotation,
    settings,
    sliding_window,
)
from minitp.oracle.ops import (
    causal_mask,
    choose_experts,
    context,
    embed,
    float64,
    geglu,
    linear,
    rms_norm,
    rope,
    route,
    scores,
    soft_cap,
    softmax,
    swiglu,
)

VOCABULARY_BLOCK = 8192  # rows of the output matrix that are converted to float64 at a time


class Oracle:
    """A model of one of the supported families that keeps one layer in memory at a time.

    Parameters
    ----------
    config : dict
        The object in config.json.
    tensor : callable
        A function tensor(name) that returns a whole tensor by its checkpoint name, in any float dtype. With a
        second argument, a tuple of slices, it returns that part of the tensor; only `check` needs this.
    layers : int or None
        Number of layers to run, from the first; None for all.

    Raises
    ------
    ValueError
        for an unsupported model type, rope type, activation or number of layers, and in `steps` for a context
        that is too long for longrope's short_factor.
    """

    def __init__(
        self, config: dict[str, Any], tensor: Callable[..., np.ndarray], layers: int | None = None
    ) -> None:
        fields = settings(config)
        family = fields["model_type"]
        self.activation = activation(fields)
        self.layers = fields["num_hidden_layers"] if layers is None else layers
        if not 1 <= self.layers <= fields["num_hidden_layers"]:
            raise ValueError(f"{layers} layers: the model has {fields['num_hidden_layers']}")
        self.heads = fields["num_attention_heads"]
        self.kv_heads = fields["num_key_value_heads"] or self.heads
        self.eps = fields["rms_norm_eps"]
        self.windows = [sliding_window(fields, i) for i in range(self.layers)]
        self.turns = [has_rope(fields, i) for i in range(self.layers)]
        self.rotations = [rotation(fields, i) for i in range(self.layers)]  # ([R/2], factor) of each layer
        self.longest = longest_context(fields)
        self.biased = set()  # projections that have a bias
        if fields["attention_bias"]:
            self.biased |= {"q_proj", "k_proj", "v_proj", "o_proj"}
        if fields["mlp_bias"]:
            self.biased |= {"gate_proj", "up_proj", "down_proj"}
        if family == "qwen2":
            self.biased = {"q_proj", "k_proj", "v_proj"}
        self.expert_block, self.expert_parts = EXPERT_NAMES.get(family, (None, ()))
        self.experts = fields["num_local_experts"] if self.expert_block else 0
        self.experts_per_token = fields["num_experts_per_tok"] if self.experts else 0
        self.normalizes_shares = fields.get("norm_topk_prob")
        self.norms_heads = family in ("qwen3", "qwen3_moe", "gemma3_text")
        self.tied = fields["tie_word_embeddings"]
        self.hidden_size = fields["hidden_size"]
        self.intermediate_size = fields["intermediate_size"]
        self.vocab_size = fields["vocab_size"]
        self.head_dim = fields["head_dim"] or self.hidden_size // self.heads
        gemma = family in GEMMA
        self.norm_offset = 1 if gemma else 0  # norms multiply by the weight plus this
        self.embedding_scale = np.sqrt(self.hidden_size) if gemma else 1
        self.score_root = np.sqrt(fields["query_pre_attn_scalar"] if gemma else self.head_dim)
        self.residual_scale = self.logits_divisor = 1
        if family == "granite":
            self.embedding_scale = fields["embedding_multiplier"]
            self.score_root = 1 / fields["attention_multiplier"]
            self.residual_scale = fields["residual_multiplier"]
            self.logits_divisor = fields["logits_scaling"]
        self.score_cap = fields["attn_logit_softcapping"] if gemma else None
        self.logits_cap = fields["final_logit_softcapping"] if gemma else None
        self.mlp_norm = "pre_feedforward_layernorm" if gemma else "post_attention_layernorm"
        post_norms = {"attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
        self.post_norms = post_norms if gemma else {}  # norms after each block
        self.tensor = tensor
        if family == "phi3":
            rows = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.intermediate_size
            self.tensor = parts_of_joined(tensor, *rows)

    @classmethod
    def from_directory(cls, path: str | Path, layers: int | None = None) -> Oracle:
        """Return an Oracle of a Hugging Face directory with config.json and safetensors files."""
        path = Path(path)
        files = {}  # tensor name -> file name
        if not (path / "model.safetensors").exists():
            files = json.loads((path / "model.safetensors.index.json").read_bytes())["weight_map"]

        def tensor(name, index=...):
            with safe_open(path / files.get(name, "model.safetensors"), framework="np") as file:
                return file.get_slice(name)[index]

        return cls(json.loads((path / "config.json").read_bytes()), tensor, layers)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor by name, from config.json; joined tensors are listed as parts."""
        hidden, ffn, vocab = self.hidden_size, self.intermediate_size, self.vocab_size
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        outs = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": kv,
            "self_attn.v_proj": kv,
            "self_attn.o_proj": hidden,
        }
        ins = {"self_attn.o_proj": q, "mlp.down_proj": ffn}
        if not self.experts:
            outs |= {"mlp.gate_proj": ffn, "mlp.up_proj": ffn, "mlp.down_proj": hidden}
        expert_shapes = (ffn, hidden), (ffn, hidden), (hidden, ffn)  # of gate, up and down
        shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
        if not self.tied:
            shapes["lm_head.weight"] = (vocab, hidden)
        for i in range(self.layers):
            for norm in {"input_layernorm", self.mlp_norm, *self.post_norms.values()}:
                shapes[f"model.layers.{i}.{norm}.weight"] = (hidden,)
            if self.norms_heads:
                for part in "qk":
                    shapes[f"model.layers.{i}.self_attn.{part}_norm.weight"] = (self.head_dim,)
            if self.experts:
                moe = f"model.layers.{i}.{self.expert_block}"
                shapes[f"{moe}.gate.weight"] = (self.experts, hidden)
                for e in range(self.experts):
                    for part, shape in zip(self.expert_parts, expert_shapes, strict=True):
                        shapes[f"{moe}.experts.{e}.{part}.weight"] = shape
            for part, out in outs.items():
                shapes[f"model.layers.{i}.{part}.weight"] = (out, ins.get(part, hidden))
                if part.split(".")[1] in self.biased:
                    shapes[f"model.layers.{i}.{part}.bias"] = (out,)
        return shapes

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Return the logits after each token: int [T] -> [T, V]."""
        for name, array in self.steps(token_ids):
            if name == "logits":
                return array

    def steps(self, token_ids: Sequence[int]) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (name, array) of every step of the forward pass, in order.

        Queries are [H, T, d], keys and values [K, T, d], `scores` and `probs` [H, T, T], `context`
        [T, H * d], `gate`, `up` and `act` [T, F], `router` [T, E], `experts` [T, X, F], `logits` [T, V],
        `tokens` and `positions` int [T], and all others [T, D]. The run continues with the arrays that it
        has yielded, so the caller may change them in place, for example to round them.
        """
        if len(token_ids) > self.longest:
            raise ValueError(f"{len(token_ids)} tokens: longrope is supported for up to {self.longest}")
        positions = np.arange(len(token_ids))  # [T]
        yield "tokens", np.asarray(token_ids)
        yield "positions", positions
        x = embed(token_ids, self.tensor("model.embed_tokens.weight"))  # [T, D]
        x *= self.embedding_scale
        yield "embed", x
        for i in range(self.layers):
            x = yield from self._attention(i, x, positions)  # [T, D]
            x = yield from self._mlp(i, x)  # [T, D]
        x = self._norm(x, "model.norm")  # [T, D]
        yield "final_norm", x
        logits = self._unembed(x) / self.logits_divisor  # [T, V]
        yield "logits", logits if self.logits_cap is None else soft_cap(logits, self.logits_cap)

    def _attention(self, i, x, positions):
        """Yield the steps of layer i's attention block; return the residual [T, D] after it."""
        step, layer = f"layers.{i}.attn", f"model.layers.{i}"
        normed = self._norm(x, f"{layer}.input_layernorm")  # [T, D]
        yield f"{step}.norm", normed
        heads = {}
        for part, n in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
            y = self._project(normed, f"{layer}.self_attn.{part}_proj")  # [T, n * d]
            heads[part] = np.stack(np.split(y, n, axis=-1))  # [n, T, d]
            yield f"{step}.{part}", heads[part]
        for part in "qk":
            if self.norms_heads:
                normed_heads = self._norm(heads[part], f"{layer}.self_attn.{part}_norm")
                heads[part] = normed_heads  # [H, T, d], [K, T, d]
                yield f"{step}.{part}_norm", heads[part]
            if self.turns[i]:
                heads[part] = rope(heads[part], positions, *self.rotations[i])  # [H, T, d], [K, T, d]
            yield f"{step}.{part}_rope", heads[part]
        mask = causal_mask(positions, positions, self.windows[i])  # [T, T]
        masked = scores(heads["q"], heads["k"], mask, self.score_root, self.score_cap)  # [H, T, T]
        yield f"{step}.scores", masked
        probs = softmax(masked)  # [H, T, T]
        yield f"{step}.probs", probs
        mixed = context(probs, heads["v"])  # [T, H * d]
        yield f"{step}.context", mixed
        out = self._project(mixed, f"{layer}.self_attn.o_proj")  # [T, D]
        return (yield from self._add(i, "attn", x, out))  # [T, D]

    def _mlp(self, i, x):
        """Yield the steps of layer i's feed-forward block; return the residual [T, D] after it."""
        step, layer = f"layers.{i}.mlp", f"model.layers.{i}"
        normed = self._norm(x, f"{layer}.{self.mlp_norm}")  # [T, D]
        yield f"{step}.norm", normed
        if self.experts:
            out = yield from self._mixture(step, f"{layer}.{self.expert_block}", normed)  # [T, D]
        else:
            out = yield from self._dense(step, layer, normed)  # [T, D]
        return (yield from self._add(i, "mlp", x, out))  # [T, D]

    def _add(self, i, block, x, out):
        """Yield the last steps of a block, from its output to the residual; return the residual [T, D].

        Granite multiplies a block's output by a factor before adding it. (Granite Team, Granite 3.0, 2024.)
        """
        step = f"layers.{i}.{block}"
        yield f"{step}.out", out
        if self.post_norms:
            out = self._norm(out, f"model.layers.{i}.{self.post_norms[block]}")  # [T, D]
            yield f"{step}.post_norm", out
        x = x + self.residual_scale * out  # [T, D]
        yield f"{step}.residual", x
        return x  # [T, D]

    def _norm(self, x, name):
        """Apply a norm: [.., D] -> [.., D]."""
        return rms_norm(x, float64(self.tensor(f"{name}.weight")) + self.norm_offset, self.eps)

    def _dense(self, step, layer, normed):
        """Yield the steps of a dense feed-forward block; return its output: [T, D] -> [T, D]."""
        gate = self._project(normed, f"{layer}.mlp.gate_proj")  # [T, F]
        yield f"{step}.gate", gate
        up = self._project(normed, f"{layer}.mlp.up_proj")  # [T, F]
        yield f"{step}.up", up
        act = (swiglu if self.activation == "silu" else geglu)(gate, up)  # [T, F]
        yield f"{step}.act", act
        return self._project(act, f"{layer}.mlp.down_proj")  # [T, D]

    def _mixture(self, step, layer, normed):
        """Yield the steps of a mixture of experts, token by token; return its output: [T, D] -> [T, D].

        The step `experts` contains the activations of each token's experts, in the order of expert number.
        """
        router = self._project(normed, f"{layer}.gate")  # [T, E]
        yield f"{step}.router", router
        chosen = choose_experts(router, self.experts_per_token)  # [T, E]
        # [T, E], possibly 0 for a chosen expert
        shares = route(router, self.experts_per_token, self.normalizes_shares)
        acts, out = [[] for _ in normed], np.zeros_like(normed)  # X arrays [F] for each token; [T, D]
        for e in range(self.experts):
            gate, up, down = (self.tensor(f"{layer}.experts.{e}.{p}.weight") for p in self.expert_parts)
            for t in np.flatnonzero(chosen[:, e]):
                acts[t].append(swiglu(linear(normed[t], gate), linear(normed[t], up)))  # [F]
                out[t] += shares[t, e] * linear(acts[t][-1], down)  # [D]
        yield f"{step}.experts", np.array(acts)  # [T, X, F]
        return out  # [T, D]

    def _project(self, x, name):
        """Apply a projection: [T, in] -> [T, out]."""
        bias = self.tensor(f"{name}.bias") if name.rpartition(".")[2] in self.biased else None  # [out]
        return linear(x, self.tensor(f"{name}.weight"), bias)

    def _unembed(self, x):
        """Compute the logits, one block of the vocabulary at a time: [T, D] -> [T, V]."""
        w = self.tensor("model.embed_tokens.weight" if self.tied else "lm_head.weight")  # [V, D]
        starts = range(0, len(w), VOCABULARY_BLOCK)
        return np.hstack([linear(x, w[i : i + VOCABULARY_BLOCK]) for i in starts])  # [T, V]
