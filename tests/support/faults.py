"""Faults of tensor parallelism to inject, and the steps and ranks that `check` must blame for each.

A fault is in one layer and on one rank, or on all ranks if it concerns a collective.
"""

import math
from dataclasses import dataclass, field
from functools import partial

import faulty_model as wrong
import numpy as np
from faulty_model import changed, reload, result, state, with_context

from minitp.trace.names import AFTER, full_name

# (tp, layer, rank): each fault is tried in the first layer on the first rank, or in the last layer on the
# last rank, and at one of the other places; they take turns.
FIRST_AND_LAST = ((4, 0, 0), (4, 2, 3))
OTHERS = ((4, 1, 2), (2, 0, 1), (3, 1, 1), (9, 2, 4), (1, 1, 0), (2, 2, 0), (9, 0, 8))
# Places for faults that need a certain sharding:
TWO_KV_HEADS = ((4, 0, 2), (4, 2, 2), (2, 1, 0), (2, 2, 1), (1, 1, 0))  # the rank has two KV heads
RAGGED = ((2, 0, 1), (2, 2, 1))  # head 5 reads KV head 1, heads 6 to 8 read KV head 2
LAST_RANK = ((4, 0, 3), (3, 0, 2), (9, 0, 8), (1, 0, 0))  # the vocabulary is split unevenly
SEVERAL = ((4, 0, 0), (4, 2, 3), (2, 1, 1), (9, 1, 5))  # several ranks, because one rank has no all-reduce
SHARED_KV_HEAD = ((4, 0, 1), (4, 2, 2))  # the KV head is also on another rank
FIRST_RANK = ((4, 0, 0), (9, 2, 0), (1, 1, 0))
WITH_WINDOW = ((4, 0, 0), (2, 2, 1))  # layers with a window in the model gemma3
LATER_LAYERS = ((4, 1, 0), (4, 2, 3), (1, 2, 0))  # not the first layer


@dataclass(frozen=True)
class Fault:
    """A fault and the steps and ranks that must be blamed for it.

    Attributes
    ----------
    name : str
    steps : str
        The steps that must be blamed, and no others: names in the tables of `trace.names`, or checkpoint
        names of the layer's weights.
    hooks : dict of str to callable
        Replacements of functions by name, active in the block with the fault. Each is called with the
        original function and its arguments.
    weights : callable or None
        A function that changes the model's weights; its arguments are the model, the layer, and a function
        from a name to a whole tensor.
    everywhere : bool
        Whether the fault is on all ranks, so that `all` must be blamed.
    passes : str or tuple of str
        The passes in which the fault must be found: all, later (those with a cache), the beginning of their
        names, or a tuple of their names.
    model : str
        The model that the fault needs, a name in check_models.MODELS.
    decode : int
        Number of tokens to decode.
    places : tuple of (tp, layer, rank)
        Places where the fault is tried; empty for one of FIRST_AND_LAST and one of OTHERS.
    dtype : str
    """

    name: str
    steps: str
    hooks: dict = field(default_factory=dict)
    weights: object = None
    everywhere: bool = False
    passes: str = "all"
    model: str = "biased"
    decode: int = 1
    places: tuple = ()
    dtype: str = "float32"

    @property
    def block(self):
        """The block in which the hooks are active: `attn` or `mlp` of the layer, or "" outside the layers."""
        first = self.steps.partition(".")[0]
        return first if first in ("attn", "mlp") else ""

    def blame(self, layer, rank, passes):
        """Return (full name, rank) of all that must be blamed, in order."""
        blamed = "all" if self.everywhere else rank
        steps = self.steps.split()
        if steps[0].endswith((".weight", ".bias")):
            return [(f"weights/model.layers.{layer}.{name}", blamed) for name in steps]
        chosen = {"all": lambda pass_: True, "later": lambda pass_: pass_.start > 0}
        if isinstance(self.passes, tuple):
            names = [pass_.name for pass_ in passes if pass_.name in self.passes]
        else:
            by_name = lambda pass_: pass_.name.startswith(self.passes)  # noqa: E731
            names = [pass_.name for pass_ in filter(chosen.get(self.passes, by_name), passes)]
        inner = layer if self.block else None
        with_logits = {pass_.name for pass_ in passes if pass_.logit_rows}
        return [
            (full_name(name, inner, step), blamed)
            for name in names
            for step in steps
            if step not in AFTER or name in with_logits
        ]


def places_of(number):
    """Return the places where fault `number` of the table is tried."""
    return FAULTS[number].places or (FIRST_AND_LAST[number % 2], OTHERS[number % len(OTHERS)])


def named(*parts):
    """Return checkpoint names: for `q` those of self_attn.q_proj's weight and bias."""
    blocks = dict.fromkeys("qkvo", "self_attn") | dict.fromkeys(("gate", "up", "down"), "mlp")
    return " ".join(f"{blocks[p]}.{p}_proj.{kind}" for kind in ("weight", "bias") for p in parts)


InDecode = partial(Fault, passes="decode")
Collective = partial(Fault, everywhere=True, places=SEVERAL)

ROPES = "attn.q_rope attn.k_rope"  # q and k are rotated in one call
CACHES = "attn.k_cache attn.v_cache"
READS_KV = "attn.scores attn.context"  # one reads the keys of a KV head, the other its values
CHOICES = "mlp.experts mlp.out_partial"  # both depend on the router's choice
PROJECTIONS = "attn.q attn.k attn.v"  # they are one joined product

not_capped = {"soft_cap": lambda soft_cap, xp, x, cap: x}
not_scaled = {"scaled": lambda scaled, xp, x, multiplier: x}
logits_as_they_are = {"logits_partial": changed(_4=lambda scaling: 1)}
no_head_norm = {"rms_norm": lambda norm, xp, x, *rest: x if x.ndim == 3 else norm(xp, x, *rest)}
llama_scale = {"attention_scores": changed(_5=lambda scale: None)}
tenth = changed(_3=lambda eps: eps / 10)
left_out = {"all_reduce": lambda all_reduce, x: (all_reduce(x), x)[1]}
twice = {"all_reduce": lambda all_reduce, x: all_reduce(all_reduce(x))}
averaged = {"all_reduce": lambda all_reduce, x: (all_reduce(x) / state.model.comm.size).astype(x.dtype)}
rolled_logits = {"all_gather": result(lambda y: np.roll(y, 25, axis=-1))}
two_swapped = {"all_gather": result(lambda y: y[:, [1, 0, *range(2, y.shape[1])]])}
no_last_column = {"logits_partial": result(lambda y: np.pad(y[:, :-1], ((0, 0), (0, 1))))}
reversed_kv_heads = changed(_2=lambda by_kv_head: by_kv_head[::-1])
other_kv_heads = {"attention_scores": reversed_kv_heads, "attention_context": reversed_kv_heads}
even_groups = {"attention_scores": wrong.even_groups, "attention_context": wrong.even_groups}
biased_term = {"row_parallel": result(lambda y: y + state.layer.b_down)}
slightly = wrong.times(1.0001)
last_bit = reload("w_o", change=lambda name, whole, model: wrong.last_bit(whole.astype(model.device.dtype)))
from_zero = with_context(lambda context, s: wrong.rotate(context, s.positions - s.positions[0]))
restarting = wrong.in_chunks({"sequence_slice": wrong.from_position_zero})
always_rotated = with_context(lambda context, s: wrong.rotate(context, s.positions))
no_attention_factor = with_context(lambda context, s: wrong.rotate(context, s.positions))
other_theta = with_context(lambda context, s: wrong.rotate(context, s.positions, rope_theta=5e5))
whole_heads = with_context(lambda context, s: wrong.rotate(context, s.positions, partial_rotary_factor=1.0))
over_all_experts = {"route": changed(_3=lambda normalized: False)}
over_own_experts = {"route": changed(_3=lambda normalized: True)}
no_scaling = with_context(lambda context, s: wrong.rotate(context, s.positions, rope_type="default"))
qkv_shifted = reload("w_qkv", "b_qkv", change=wrong.shifted_by_one)
next_kv_heads = reload("w_qkv", "b_qkv", change=wrong.neighbors_kv_heads)
mlp_off = reload("mlp_norm", "w_gate_up", "w_down", change=wrong.slightly_off)
MLP_WEIGHTS = "post_attention_layernorm.weight mlp.gate_proj.weight mlp.up_proj.weight mlp.down_proj.weight"

FAULTS = [
    # norms
    Fault("wrong eps", "attn.norm", {"rms_norm": tenth}),
    Fault("wrong eps before the mlp", "mlp.norm", {"rms_norm": tenth}),
    Fault("norm weight missing", "attn.norm", {"rms_norm": changed(_2=np.ones_like)}),
    Fault("norm weight missing before the mlp", "mlp.norm", {"rms_norm": changed(_2=np.ones_like)}),
    Fault("mean subtracted", "mlp.norm", {"rms_norm": changed(_1=lambda x: x - x.mean(-1)[:, None])}),
    Fault("final norm skipped", "final_norm", {"rms_norm": lambda norm, xp, x, weight, eps: x}),
    # projections
    Fault("biases missing", PROJECTIONS, {"column_parallel": changed(_3=lambda bias: None)}),
    Fault("biases added twice", PROJECTIONS, {"column_parallel": changed(_3=lambda bias: bias + bias)}),
    Fault("heads in the wrong order", "attn.out_partial", {"row_parallel": changed(_1=wrong.swapped_halves)}),
    Fault("projections slightly off", PROJECTIONS, {"column_parallel": slightly}, places=SHARED_KV_HEAD),
    # positions
    Fault("interleaved RoPE", ROPES, {"apply_rope": wrong.interleaved}),
    Fault("RoPE off by one", ROPES, with_context(lambda context, s: wrong.rotate(context, s.positions + 1))),
    Fault("wrong theta", ROPES, other_theta),
    Fault("rotated backwards", ROPES, {"apply_rope": changed(_3=np.negative)}),
    Fault("RoPE scaling left out", ROPES, no_scaling, model="scaled"),
    Fault("positions begin at 0 in decode", ROPES, from_zero, passes="later"),
    # attention
    Fault("scale by d", "attn.scores", {"attention_scores": wrong.scaled_scores(lambda d: d**-0.5)}),
    Fault("no scale", "attn.scores", {"attention_scores": wrong.scaled_scores(math.sqrt)}),
    Fault("mask off by one", "attn.scores", wrong.shifted_mask(1), passes="prefill"),
    Fault("query hidden from itself", "attn.scores", wrong.shifted_mask(-1), passes="prefill"),
    Fault("no mask", "attn.scores", {"attention_scores": changed(_4=lambda mask: None)}, passes="prefill"),
    Fault(  # the chunk prefill.0 has fewer tokens than the window
        "window one too long",
        "attn.scores",
        wrong.other_window(1),
        passes=("prefill", "prefill.1", "decode.1"),
        model="window",
    ),
    Fault(
        "window one too short",
        "attn.scores",
        wrong.without_cache(wrong.other_window(-1)),
        passes=("prefill",),
        model="window",
        decode=0,
    ),
    InDecode("window too short in decode", CACHES, wrong.in_decode(wrong.other_window(-1)), model="window"),
    Fault("neighbor's KV heads read", READS_KV, other_kv_heads, places=TWO_KV_HEADS),
    Fault("query heads grouped evenly", READS_KV, even_groups, places=RAGGED),
    Fault("softmax over the queries", "attn.probs", {"softmax": wrong.softmax_over_queries}),
    Fault("softmax overflows", "attn.probs", {"softmax": wrong.no_maximum_subtracted}, model="loud"),
    Fault("context in the wrong order", "attn.context", {"attention_context": result(wrong.swapped_halves)}),
    # the cache
    InDecode("cache written one slot too far", CACHES, {"append": wrong.one_slot_too_far}, decode=2),
    InDecode("stale cache entry", CACHES, wrong.stale("kv"), decode=2),
    InDecode("stale key", "attn.k_cache", wrong.stale("k")),
    InDecode("stale value", "attn.v_cache", wrong.stale("v")),
    Fault("values of another layer", "attn.v_cache", {"append": wrong.other_layer}, places=LATER_LAYERS),
    Fault("keys and values swapped", CACHES, {"append": result(lambda both: both[::-1])}),
    # collectives
    Collective("all-reduce left out", "attn.out", left_out),
    Collective("all-reduce left out after the mlp", "mlp.out", left_out),
    Collective("all-reduce of the embedding left out", "embed", left_out, decode=0),
    Fault("all-reduce left out on one rank", "mlp.out", left_out, places=SEVERAL),
    Collective("all-reduce done twice", "attn.out", twice),
    Collective("all-reduce done twice after the mlp", "mlp.out", twice),
    Collective("mean instead of sum", "mlp.out", averaged),
    Collective("bias on every rank", "attn.out", {"all_reduce": wrong.bias_on_every_rank}),
    Collective("bias on every rank of the mlp", "mlp.out", {"all_reduce": wrong.bias_on_every_rank}),
    Fault("bias in one rank's term", "mlp.out_partial", biased_term),
    Fault(  # a model without biases, because adding a bias may round the bit away
        "last bit of the sum",
        "attn.out",
        {"all_reduce": result(wrong.last_bit)},
        model="tied",
        places=((*SEVERAL[:2], (2, 1, 1))),
    ),
    Collective("logits in the wrong order", "logits", rolled_logits, places=((4, 0, 0), (1, 0, 0))),
    Fault("logits in the wrong order on one rank", "logits", two_swapped, places=SEVERAL),
    # the feed-forward block and the residual stream
    Fault("gate and up swapped", "mlp.act", {"swiglu": changed(_1=wrong.swapped_halves)}),
    Fault("gate and up mixed up", "mlp.gate mlp.up", {"column_parallel": result(wrong.swapped_halves)}),
    Fault("no activation", "mlp.act", {"swiglu": lambda swiglu, xp, y: np.split(y, 2, axis=-1)[1]}),
    Fault("residual added twice", "attn.residual", wrong.stream(lambda x: 2 * x)),
    Fault("residual left out", "mlp.residual", wrong.stream(lambda x: 0 * x)),
    # operations that only some families have
    Fault("q and k not normalized", "attn.q_norm attn.k_norm", no_head_norm, model="normed"),
    Fault("attention factor left out", ROPES, no_attention_factor, model="yarn"),
    Fault("router rows in the wrong order", "mlp.router", wrong.other_router, model="mixture"),
    Fault("experts next to the chosen ones", CHOICES, {"route": wrong.next_experts}, model="mixture"),
    Fault("expert weights not normalized", "mlp.out_partial", over_all_experts, model="mixture"),
    Fault("expert weights left out", "mlp.out_partial", {"route": wrong.no_expert_weights}, model="mixture"),
    Fault("norm weights without added one", "attn.norm attn.post_norm", wrong.no_added_one, model="gemma"),
    Fault("no norm after attention", "attn.post_norm", wrong.without("attn_post_norm"), model="gemma"),
    Fault("no norm after the mlp", "mlp.post_norm", wrong.without("mlp_post_norm"), model="gemma"),
    Fault("scores not capped", "attn.scores", not_capped, model="gemma"),
    Fault("logits not capped", "logits_partial", not_capped, model="gemma"),
    Fault("SiLU instead of GELU", "mlp.act", {"geglu": wrong.silu_instead_of_gelu}, model="gemma"),
    Fault("embedding not scaled", "embed_partial", not_scaled, model="gemma", decode=0),
    Fault("scores scaled as in Llama", "attn.scores", llama_scale, model="granite"),
    Fault("output of attention not scaled", "attn.residual", not_scaled, model="granite"),
    Fault("output of the mlp not scaled", "mlp.residual", not_scaled, model="granite"),
    Fault("logits not scaled", "logits_partial", logits_as_they_are, model="granite"),
    Fault(
        "expert weights normalized",
        "mlp.out_partial",
        over_own_experts,
        model="shares",
        places=FIRST_AND_LAST,
    ),
    Fault(
        "expert weights of a sigmoid",
        "mlp.out_partial",
        {"route": wrong.sigmoid_shares},
        model="shares",
        places=FIRST_AND_LAST,
    ),
    Fault(
        "head norms without added one",
        "attn.q_norm attn.k_norm",
        wrong.no_added_one_in_heads,
        model="gemma3",
        places=FIRST_AND_LAST,
    ),
    Fault(
        "RoPE of the layers of the other kind",
        ROPES,
        with_context(wrong.angles_of_the_other_layers),
        model="gemma3",
        places=((4, 0, 0), (2, 1, 1)),
    ),
    Fault(
        "window left out in one layer",
        "attn.scores",
        with_context(wrong.window_of_the_other_layers),
        passes=("prefill", "prefill.1", "decode.1"),  # prefill.0 has fewer tokens than the window
        model="gemma3",
        places=WITH_WINDOW,
    ),
    Fault(
        "window in a layer with full attention",
        "attn.scores",
        wrong.without_cache(with_context(wrong.window_of_the_other_layers)),
        passes=("prefill",),
        model="gemma3",
        decode=0,
        places=((4, 1, 2),),
    ),
    # vocabulary
    Fault(
        "embedding off by one", "embed_partial", {"embed_partial": changed(_3=lambda row: row + 1)}, decode=0
    ),
    Fault(
        "last row of the embedding missing",
        "embed_partial",
        {"embed_partial": changed(_2=lambda table: table[:-1])},
        passes=("prefill", "prefill.0"),  # the last row's token is the first of the prompt
        places=LAST_RANK,
        decode=0,  # a decoded token may be in another rank's rows
    ),
    Fault("last row of the head missing", "logits_partial", no_last_column, places=LAST_RANK),
    Fault("head not tied", "logits_partial", weights=wrong.untied_head, model="tied"),
    # weights
    Fault("neighbor's KV heads", named(*"kv"), weights=next_kv_heads),
    Fault(
        "shard of the wrong columns",
        "mlp.down_proj.weight",
        weights=reload("w_down", change=wrong.shifted_by_one),
    ),
    Fault("shard of the wrong rows", named(*"qkv"), weights=qkv_shifted),
    Fault("gate and up weights swapped", named("gate", "up"), weights=wrong.gate_and_up_swapped),
    Fault("weights slightly off", MLP_WEIGHTS, weights=mlp_off),
    Fault(
        "one weight slightly off", "self_attn.o_proj.weight", weights=reload("w_o", change=wrong.slightly_off)
    ),
    Fault("last bit of a weight", "self_attn.o_proj.weight", weights=last_bit, places=FIRST_RANK),
    # 16 bits
    Fault(
        "sums in 16 bits",
        "mlp.out_partial",
        {"row_parallel": wrong.sum_in_16_bits},
        dtype="bfloat16",
        decode=0,  # the few numbers of a single token may be close by chance
        places=((1, 0, 0), (1, 2, 0)),  # on several ranks, the sums have few terms and may be close by chance
    ),
    Fault(
        "scores in 16 bits",
        "attn.scores",
        {"attention_scores": result(wrong.rounded_to_16_bits)},
        dtype="bfloat16",
    ),
    Fault(
        "logits in 16 bits",
        "logits_partial",
        {"logits_partial": result(wrong.rounded_to_16_bits)},
        dtype="bfloat16",
    ),
    Fault("RoPE in a layer without it", ROPES, always_rotated, model="unturned"),
    # the inputs of a pass
    InDecode("token of the step before", "tokens", {"forward": wrong.token_before}),
    Collective("not the most probable token", "tokens", {"forward": wrong.another_token}, passes="decode"),
    Fault("prompt shifted by one", "tokens", {"forward": changed(_0=wrong.shifted_tokens)}, passes="prefill"),
    Fault("positions restart in a later chunk", "positions", restarting, passes=("prefill.1",)),
    Fault("angles restart in a later chunk", ROPES, wrong.in_chunks(from_zero), passes=("prefill.1",)),
    Fault("RoPE over the whole head", ROPES, whole_heads, model="partial"),
]
