"""Draw random models of every family, each with a run in which `check` must not blame anything.

`draw_run` draws a config.json, the scales of the weights, a prompt, the dtypes and the number of ranks. All
of it follows from a seed and a number, so one run can be repeated.
"""

import json
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from minitp.loading.config import parse_config
from minitp.loading.families import FAMILIES
from minitp.shard import make_plan

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
LONGEST = 64  # max_position_embeddings, more than the prompt and the decoded tokens

# Groups of tensors whose weights have one scale; a tensor belongs to the first group with one of its words.
GROUPS = {
    "bias": (".bias",),
    "norm": ("norm.weight",),
    "embed": ("embed_tokens",),
    "head": ("lm_head",),
    "qk": ("q_proj", "k_proj"),
    "vo": ("v_proj", "o_proj"),
    "router": ("block_sparse_moe.gate.", "mlp.gate."),
    "ffn": ("",),
}
# The factors that a group is drawn from, in float32 and bfloat16; in float16 large ones would overflow.
FACTORS = {
    "bias": (0, 0.1, 1, 3),
    "norm": (0.05, 0.3, 1, 4),
    "embed": (1e-3, 0.03, 1, 10, 100),
    "head": (1e-3, 0.1, 1, 10, 50),
    "qk": (0.03, 0.3, 1, 3, 10),
    "vo": (0.03, 0.3, 1, 3),
    "router": (0.01, 1, 10, 100),
    "ffn": (0.03, 0.3, 1, 3),
}
HEADS = ((1, 1), (2, 1), (3, 3), (4, 2), (5, 1), (6, 3), (7, 1), (8, 4), (9, 3), (12, 4), (14, 2))
SPREADS = (0, 0.3, 1, 2)  # standard deviations of the logarithm of a channel's size


@dataclass(frozen=True)
class Run:
    """A model and a run of it; nothing in it is wrong.

    Attributes
    ----------
    fields : dict
        The object in config.json.
    stored, dtype : str
        The dtype of the checkpoint, and that of the run.
    scales : dict of str to (factor, spread)
        The sizes of the weights by group; see GROUPS. {} for weights that keep activations near one.
    tp : int
    token_ids : list of int
        The prompt.
    decode : int
        The number of tokens to decode.
    batch : int
        The number of sequences in the engine; 0 for none.
    kv_dtype : str
    seed : list of int
        The seed of the weights.
    """

    fields: dict
    stored: str
    dtype: str
    scales: dict
    tp: int
    token_ids: list
    decode: int
    batch: int
    kv_dtype: str
    seed: list

    @property
    def weights(self):
        """The kind of the weights, for statistics."""
        return "scaled weights" if self.scales else "usual weights"

    def __str__(self):
        f = self.fields
        options = {name: value for name, value in f.items() if name not in NOT_OPTIONS}
        sizes = f"{f['num_hidden_layers']} layers, D {f['hidden_size']}, F {f['intermediate_size']}, "
        sizes += f"{f['num_attention_heads']} heads on {f['num_key_value_heads']} of {f['head_dim']}, "
        sizes += f"V {f['vocab_size']}"
        return (
            f"{f['model_type']} {self.dtype} (stored {self.stored}), tp {self.tp}: {sizes}; "
            f"{len(self.token_ids)} tokens ({len(set(self.token_ids))} different) + {self.decode}, "
            f"batch {self.batch}, cache {self.kv_dtype}; "
            f"scales {self.scales}; {json.dumps(options)}"
        )

    def write(self, directory):
        """Write the model into `directory`, a Path that is created, and return it."""
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(self.fields, indent=2), encoding="utf-8")
        tensors = random_weights(self.fields, self.scales, self.seed)
        kind = DTYPES[self.stored]
        save_file({name: x.astype(kind) for name, x in tensors.items()}, directory / "model.safetensors")
        return directory


NOT_OPTIONS = (
    *("model_type", "architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
)


def draw_run(seed, number, on_gpu=False):
    """Draw run `number` of a seed; with `on_gpu`, one that `cuda.fused` supports."""
    rng = np.random.default_rng([seed, number])
    family = tuple(FAMILIES)[number % len(FAMILIES)]
    dtype = pick(rng, *DTYPES) if not on_gpu else pick(rng, "float16", "bfloat16")
    fields = draw_sizes(rng)
    tp = draw_ranks(rng, fields, on_gpu)
    fields |= {"model_type": family, "architectures": [FAMILIES[family]["architecture"]]}
    fields |= {"rms_norm_eps": pick(rng, 1e-6, 1e-5), "tie_word_embeddings": chance(rng, 0.3)}
    fields |= draw_options(rng, family, fields)
    fields |= draw_rope(rng, family, fields["head_dim"])
    stored = dtype if chance(rng, 0.5) else pick(rng, *DTYPES)
    run = Run(
        fields=fields,
        stored=stored,
        dtype=dtype,
        scales={} if chance(rng, 0.3) else draw_scales(rng, "float16" in (stored, dtype)),
        tp=tp,
        token_ids=draw_tokens(rng, fields["vocab_size"]),
        decode=int(rng.integers(0, 4)),
        batch=pick(rng, 0, 0, 0, 2, 3),
        kv_dtype="auto" if on_gpu else pick(rng, "auto", "auto", "auto", "float16", "int8"),
        seed=[seed, number, 1],
    )
    # Draw what was added later after everything else, so that the other models stay as they were.
    if "partial_rotary_factor" in FAMILIES[family]["reads"] and chance(rng, 0.5):
        rotate_a_part(rng, fields)
    return run


def draw_sizes(rng):
    """Return the fields of config.json with the sizes of a model."""
    heads, kv_heads = HEADS[rng.integers(len(HEADS))]
    medium = chance(rng, 0.3)
    head_dim = 2 * int(rng.integers(2, 33 if medium else 8))
    hidden = int(rng.integers(65, 257) if medium else rng.integers(2, 65))
    return {
        "hidden_size": hidden,
        "intermediate_size": int(rng.integers(1, 300 if medium else 50)),
        "num_hidden_layers": int(rng.integers(1, 5)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": int(rng.integers(1, 1000 if chance(rng, 0.1) else 130)),
        "max_position_embeddings": LONGEST,
    }


def draw_ranks(rng, fields, on_gpu):
    """Return a number of ranks from 1 to the number of heads; the largest one often."""
    most = fields["num_attention_heads"]
    if on_gpu:  # more GPUs than this test nothing else, and take long
        most = min(most, 4)
    return most if chance(rng, 0.3) else int(rng.integers(1, most + 1))


def draw_options(rng, family, fields):
    """Return the fields of config.json that only some families read."""
    reads, layers = FAMILIES[family]["reads"], fields["num_hidden_layers"]
    options = {name: chance(rng, 0.5) for name in ("attention_bias", "mlp_bias") if name in reads}
    if "sliding_window" in reads:
        options["sliding_window"] = None if chance(rng, 0.4) else int(rng.integers(1, 20))
    if "use_sliding_window" in reads:
        options["use_sliding_window"] = options["sliding_window"] is not None
        options["max_window_layers"] = int(rng.integers(0, layers + 1))
    if "layer_types" in reads and options["sliding_window"] and chance(rng, 0.5):
        options["layer_types"] = [pick(rng, "full_attention", "sliding_attention") for _ in range(layers)]
    if "no_rope_layers" in reads:
        options["no_rope_layer_interval"] = int(rng.integers(1, 5))
        options["no_rope_layers"] = [int(rng.integers(0, 2)) for _ in range(layers)]
        del options[pick(rng, *(name for name in options if name.startswith("no_rope")))]
    if "query_pre_attn_scalar" in reads:
        options["query_pre_attn_scalar"] = pick(rng, 1, fields["head_dim"], 144)
    for name, caps in (("attn_logit_softcapping", (1.5, 50.0)), ("final_logit_softcapping", (2.0, 30.0))):
        if name in reads:
            options[name] = pick(rng, None, *caps)
    if "sliding_window_pattern" in reads:
        options["sliding_window"] = options["sliding_window"] or 1000  # these models always have a window
        options["sliding_window_pattern"] = int(rng.integers(1, 5))
    if family == "granite":
        options["embedding_multiplier"] = pick(rng, 1.0, 0.3, 12.0)
        options["attention_multiplier"] = pick(rng, 0.015625, 0.25, 1.0)
        options["residual_multiplier"] = pick(rng, 0.22, 1.0, 1.7)
        options["logits_scaling"] = pick(rng, 1.0, 8.0, 13.0)
    if "num_local_experts" in reads:
        experts = int(rng.integers(1, 9))
        options |= {"num_local_experts": experts, "num_experts_per_tok": int(rng.integers(1, experts + 1))}
    if "moe_intermediate_size" in reads:
        options |= {"norm_topk_prob": chance(rng, 0.5), "moe_intermediate_size": fields["intermediate_size"]}
    return options


def draw_rope(rng, family, head_dim):
    """Return the RoPE in the older spelling of config.json, or in the newer one."""
    kinds = ["default", "default", "linear", "llama3"]
    kinds += ["longrope", "longrope" if family == "phi3" else "yarn"]  # in Phi-3 files yarn is longrope
    theta, kind = pick(rng, 100.0, 10000.0, 1e6), pick(rng, *kinds)
    original = int(rng.integers(2, 200))
    rope = {"rope_type": kind}
    if kind in ("linear", "llama3", "yarn"):
        rope["factor"] = float(rng.uniform(1, 9))
    if kind == "llama3":
        low = float(rng.uniform(0.5, 2))
        rope |= {"low_freq_factor": low, "high_freq_factor": low * float(rng.uniform(1.1, 6))}
    if kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = original
    if kind == "yarn":
        rope |= pick(rng, {}, {"attention_factor": 1.3}, {"mscale": 0.7, "mscale_all_dim": 1.2})
        rope |= pick(rng, {}, {"truncate": False}, {"beta_fast": 8.0, "beta_slow": 2.0})
    if kind == "longrope":
        rope |= {name: rng.uniform(1, 6, head_dim // 2).tolist() for name in ("short_factor", "long_factor")}
        rope["original_max_position_embeddings"] = LONGEST
        rope |= pick(rng, {}, {"attention_factor": 1.2}, {"factor": 4.0})
    newer = chance(rng, 0.5)
    older = {"rope_theta": theta, "rope_scaling": None if kind == "default" else rope}
    if "rope_local_base_freq" in FAMILIES[family]["reads"]:  # another RoPE in the layers with a window
        local = pick(rng, 10.0, 10000.0)
        kinds = {"full_attention": {**rope, "rope_theta": theta}}
        kinds["sliding_attention"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": local}
        return {"rope_parameters": kinds} if newer else older | {"rope_local_base_freq": local}
    return {"rope_parameters": {**rope, "rope_theta": theta}} if newer else older


def rotate_a_part(rng, fields):
    """Change `fields` to a model that rotates only some dimensions of each head, perhaps all but two."""
    pairs = int(rng.integers(1, fields["head_dim"] // 2))
    factor = (2 * pairs + 0.5) / fields["head_dim"]  # 0.5, because the product is rounded down
    rope = fields.get("rope_parameters") or fields.get("rope_scaling")
    for name in ("short_factor", "long_factor"):
        if rope and name in rope:
            rope[name] = rope[name][:pairs]
    (rope if rope and chance(rng, 0.5) else fields)["partial_rotary_factor"] = factor


def draw_scales(rng, float16):
    """Return a factor and a spread for each group of tensors, small ones for float16."""
    limit = 4 if float16 else np.inf
    factors = {name: pick(rng, *(f for f in found if f <= limit)) for name, found in FACTORS.items()}
    spreads = [spread for spread in SPREADS if spread < limit / 2]
    return {name: (factor, pick(rng, *spreads)) for name, factor in factors.items()}


def draw_tokens(rng, vocabulary):
    """Return 1 to 40 token ids: of the whole vocabulary, of only three tokens, or all equal."""
    count, different = int(rng.integers(1, 41)), pick(rng, vocabulary, vocabulary, 3, 1)
    return rng.choice(rng.integers(0, vocabulary, different), count).tolist()


def random_weights(fields, scales, seed):
    """Return the tensors of a checkpoint with these `fields`, in float32."""
    rng = np.random.default_rng(seed)
    plan = make_plan(parse_config(fields, "random"), tp=1)
    tensors = {}
    for name, shard in plan.tensors.items():
        group = next(group for group, words in GROUPS.items() if any(word in name for word in words))
        factor, spread = scales.get(group, (1, 0))
        values = rng.standard_normal(shard.shape)
        if group == "norm":
            values = 1 + values / 10
        elif group not in ("embed", "head", "bias"):
            values /= shard.shape[-1] ** 0.5
        values *= factor * np.exp(spread * rng.standard_normal(shard.shape[-1]))
        tensors.setdefault(shard.part_of or name, []).append(values.astype(np.float32))
    return {name: np.concatenate(parts) for name, parts in tensors.items()}


def pick(rng, *choices):
    """Return one of the choices, each with the same probability."""
    return choices[rng.integers(len(choices))]


def chance(rng, probability):
    """Return True with this probability."""
    return bool(rng.random() < probability)
