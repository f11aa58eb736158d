"""What people get wrong in tensor parallelism: faults to inject, and whom `check` must blame for each.

A fault is in one layer and on one rank, or on all ranks if it concerns a collective.
"""

import math
from dataclasses import dataclass, field
from functools import partial

import faulty_model as wrong
import numpy as np
from faulty_model import changed, here, reload, result, with_step

from minitp.trace.names import full_name

# (tp, layer, rank): a fault is tried on the first rank of the first layer, on the last of the last, and on
# one of the others in turn.
FIRST_AND_LAST = ((4, 0, 0), (4, 2, 3))
OTHERS = ((4, 1, 2), (2, 0, 1), (3, 1, 1), (9, 2, 4), (1, 1, 0), (2, 2, 0), (9, 0, 8))
# For faults that need something of a place:
TWO_KV_HEADS = ((4, 0, 2), (4, 2, 2), (2, 1, 0), (2, 2, 1), (1, 1, 0))  # on that rank
RAGGED = ((2, 0, 1), (2, 2, 1))  # heads 5 to 8 on KV heads 1 and 2: one reads the first, three the second
LAST_RANK = ((4, 0, 3), (3, 0, 2), (9, 0, 8), (1, 0, 0))  # where the shares of the vocabulary are uneven
SEVERAL = ((4, 0, 0), (4, 2, 3), (2, 1, 1), (9, 1, 5))  # a single rank has no all-reduce to get wrong
SHARED_KV_HEAD = ((4, 0, 1), (4, 2, 2))  # both hold the second of three
FIRST_RANK = ((4, 0, 0), (9, 2, 0), (1, 1, 0))
LATER_LAYERS = ((4, 1, 0), (4, 2, 3), (1, 2, 0))  # than the first


@dataclass(frozen=True)
class Fault:
    """A fault and the blame that it must get.

    Attributes
    ----------
    name : str
    steps : str
        The steps that must be blamed, and no others: as in the tables of `steps`, or checkpoint names of the
        layer's weights.
    hooks : dict of str to callable
        Each gets the original function and its arguments, in the block that has the fault.
    weights : callable or None
        Gets the model, the layer and a function: name -> whole tensor; changes the model's weights.
    everywhere : bool
        On all ranks, and all must be blamed as one.
    passes : str
        In which it must show, from the first of them on: all, prefill or decode.
    model : str
        Which of the tests' models it needs.
    decode : int
        Tokens to decode.
    places : tuple of (tp, layer, rank)
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
        """Where the hooks are active: `attn` or `mlp` of the layer, "" for what is outside the layers."""
        first = self.steps.partition(".")[0]
        return first if first in ("attn", "mlp") else ""

    def blame(self, layer, rank, passes):
        """(full name, rank) of all that must be blamed, in order."""
        who = "all" if self.everywhere else rank
        steps = self.steps.split()
        if steps[0].endswith((".weight", ".bias")):
            return [(f"weights/model.layers.{layer}.{name}", who) for name in steps]
        shown = [name for name, _, _ in passes if self.passes == "all" or name.startswith(self.passes)]
        inner = layer if self.block else None
        return [(full_name(name, inner, step), who) for name in shown for step in steps]


def places_of(number):
    """Where fault `number` of the table is tried."""
    return FAULTS[number].places or (*FIRST_AND_LAST, OTHERS[number % len(OTHERS)])


def named(*parts):
    """Checkpoint names: `q` is self_attn.q_proj's weight and bias."""
    blocks = dict.fromkeys("qkvo", "self_attn") | dict.fromkeys(("gate", "up", "down"), "mlp")
    return " ".join(f"{blocks[p]}.{p}_proj.{kind}" for kind in ("weight", "bias") for p in parts)


InDecode = partial(Fault, passes="decode")
Collective = partial(Fault, everywhere=True, places=SEVERAL)

ROPES = "attn.q_rope attn.k_rope"  # q and k are turned by one call
CACHES = "attn.k_cache attn.v_cache"
READS_KV = "attn.scores attn.context"  # both go by the KV head: the keys in the one, the values in the other
CHOICES = "mlp.experts mlp.out_partial"  # both go by what the router has chosen
PROJECTIONS = "attn.q attn.k attn.v"  # one joined product

not_capped = {"soft_cap": lambda soft_cap, xp, x, cap: x}
not_scaled = {"scaled": lambda scaled, xp, x, multiplier: x}
logits_as_they_are = {"logits_partial": changed(_4=lambda scaling: 1)}
no_head_norm = {"rms_norm": lambda norm, xp, x, *rest: x if x.ndim == 3 else norm(xp, x, *rest)}
llamas_scale = {"attention_scores": changed(_5=lambda scale: None)}
tenth = changed(_3=lambda eps: eps / 10)
left_out = {"all_reduce": lambda all_reduce, x: (all_reduce(x), x)[1]}
twice = {"all_reduce": lambda all_reduce, x: all_reduce(all_reduce(x))}
averaged = {"all_reduce": lambda all_reduce, x: (all_reduce(x) / here.model.comm.size).astype(x.dtype)}
rolled_logits = {"all_gather": result(lambda y: np.roll(y, 25, axis=-1))}
two_swapped = {"all_gather": result(lambda y: y[:, [1, 0, *range(2, y.shape[1])]])}
no_last_column = {"logits_partial": result(lambda y: np.pad(y[:, :-1], ((0, 0), (0, 1))))}
reversed_kv_heads = changed(_2=lambda by_kv_head: by_kv_head[::-1])
other_kv_heads = {"attention_scores": reversed_kv_heads, "attention_context": reversed_kv_heads}
even_groups = {"attention_scores": wrong.even_groups, "attention_context": wrong.even_groups}
biased_term = {"row_parallel": result(lambda y: y + here.layer.b_down)}
slightly = wrong.times(1.0001)
last_bit = reload("w_o", change=lambda name, whole, model: wrong.last_bit(whole.astype(model.device.dtype)))
from_zero = with_step(lambda step, s: wrong.turn(step, s.positions - s.positions[0]))
always_turned = with_step(lambda step, s: setattr(step, "layers_without_rope", frozenset()))
no_attention_factor = with_step(lambda step, s: wrong.turn(step, s.positions))
no_scaling = with_step(lambda step, s: wrong.turn(step, s.positions, rope_type="default"))
qkv_one_on = reload("w_qkv", "b_qkv", change=wrong.one_column_on)
next_kv_heads = reload("w_qkv", "b_qkv", change=wrong.neighbours_kv_heads)
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
    Fault("heads in another order", "attn.out_partial", {"row_parallel": changed(_1=wrong.swapped_halves)}),
    Fault("projections slightly off", PROJECTIONS, {"column_parallel": slightly}, places=SHARED_KV_HEAD),
    # positions
    Fault("interleaved RoPE", ROPES, {"apply_rope": wrong.interleaved}),
    Fault("RoPE off by one", ROPES, with_step(lambda step, s: wrong.turn(step, s.positions + 1))),
    Fault("wrong theta", ROPES, with_step(lambda step, s: wrong.turn(step, s.positions, rope_theta=5e5))),
    Fault("turned backwards", ROPES, {"apply_rope": changed(_3=np.negative)}),
    Fault("RoPE scaling forgotten", ROPES, no_scaling, model="scaled"),
    InDecode("positions begin at 0 in decode", ROPES, from_zero),
    # attention
    Fault("scale by d", "attn.scores", {"attention_scores": wrong.own_scale(lambda d: d**-0.5)}),
    Fault("no scale", "attn.scores", {"attention_scores": wrong.own_scale(math.sqrt)}),
    Fault("mask off by one", "attn.scores", wrong.shifted_mask(1), passes="prefill"),
    Fault("query hidden from itself", "attn.scores", wrong.shifted_mask(-1), passes="prefill"),
    Fault("no mask", "attn.scores", {"attention_scores": changed(_4=lambda mask: None)}, passes="prefill"),
    Fault("window one too long", "attn.scores", wrong.other_window(1), model="window"),
    Fault("window one too short", "attn.scores", wrong.other_window(-1), model="window", decode=0),
    InDecode("window too short in decode", CACHES, wrong.in_decode(wrong.other_window(-1)), model="window"),
    Fault("neighbour's KV heads read", READS_KV, other_kv_heads, places=TWO_KV_HEADS),
    Fault("query heads dealt evenly", READS_KV, even_groups, places=RAGGED),
    Fault("softmax over the queries", "attn.probs", {"softmax": wrong.softmax_over_queries}),
    Fault("softmax overflows", "attn.probs", {"softmax": wrong.no_maximum_subtracted}, model="loud"),
    Fault("context in another order", "attn.context", {"attention_context": result(wrong.swapped_halves)}),
    # the cache
    InDecode("cache written one slot too far", CACHES, {"append": wrong.one_slot_too_far}, decode=2),
    InDecode("stale cache entry", CACHES, wrong.stale("kv"), decode=2),
    InDecode("stale key", "attn.k_cache", wrong.stale("k")),
    InDecode("stale value", "attn.v_cache", wrong.stale("v")),
    Fault("values of another layer", "attn.v_cache", {"append": wrong.other_layer}, places=LATER_LAYERS),
    Fault("keys for values", CACHES, {"append": result(lambda both: both[::-1])}),
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
    Fault(  # without a bias, which may round the bit away
        "a bit off in the sum",
        "attn.out",
        {"all_reduce": result(wrong.last_bit)},
        model="tied",
        places=((*SEVERAL[:2], (2, 1, 1))),
    ),
    Collective("logits in another order", "logits", rolled_logits, places=((4, 0, 0), (1, 0, 0))),
    Fault("logits in another order on one rank", "logits", two_swapped, places=SEVERAL),
    # the feed-forward part and the stream
    Fault("gate and up swapped", "mlp.act", {"swiglu": changed(_1=wrong.swapped_halves)}),
    Fault("gate and up mixed up", "mlp.gate mlp.up", {"column_parallel": result(wrong.swapped_halves)}),
    Fault("no activation", "mlp.act", {"swiglu": lambda swiglu, xp, y: np.split(y, 2, axis=-1)[1]}),
    Fault("residual added twice", "attn.residual", wrong.stream(lambda x: 2 * x)),
    Fault("residual left out", "mlp.residual", wrong.stream(lambda x: 0 * x)),
    # what only some families have
    Fault("q and k not normalised", "attn.q_norm attn.k_norm", no_head_norm, model="normed"),
    Fault("attention factor left out", ROPES, no_attention_factor, model="yarn"),
    Fault("router's rows mixed up", "mlp.router", wrong.other_router, model="mixture"),
    Fault("the experts beside the chosen", CHOICES, {"route": wrong.next_experts}, model="mixture"),
    Fault("shares not normalised", "mlp.out_partial", {"route": wrong.shares_of_all}, model="mixture"),
    Fault("shares left out", "mlp.out_partial", {"route": wrong.no_shares}, model="mixture"),
    Fault("norms times the weight alone", "attn.norm attn.post_norm", wrong.weight_alone, model="gemma"),
    Fault("no norm behind attention", "attn.post_norm", wrong.without("attn_post_norm"), model="gemma"),
    Fault("no norm behind the mlp", "mlp.post_norm", wrong.without("mlp_post_norm"), model="gemma"),
    Fault("scores not capped", "attn.scores", not_capped, model="gemma"),
    Fault("logits not capped", "logits_partial", not_capped, model="gemma"),
    Fault("silu for gelu", "mlp.act", {"geglu": wrong.silu_for_gelu}, model="gemma"),
    Fault("embedding not scaled", "embed_partial", not_scaled, model="gemma", decode=0),
    Fault("scores scaled as a Llama's", "attn.scores", llamas_scale, model="granite"),
    Fault("output of attention not scaled", "attn.residual", not_scaled, model="granite"),
    Fault("output of the mlp not scaled", "mlp.residual", not_scaled, model="granite"),
    Fault("logits not scaled", "logits_partial", logits_as_they_are, model="granite"),
    # vocabulary
    Fault(
        "embedding off by one", "embed_partial", {"embed_partial": changed(_3=lambda row: row + 1)}, decode=0
    ),
    Fault(
        "last row of the embedding forgotten",
        "embed_partial",
        {"embed_partial": changed(_2=lambda table: table[:-1])},
        places=LAST_RANK,
        decode=0,  # which rank holds a decoded token is up to the model
    ),
    Fault("last row of the head forgotten", "logits_partial", no_last_column, places=LAST_RANK),
    Fault("head not tied", "logits_partial", weights=wrong.head_of_its_own, model="tied"),
    # weights
    Fault("neighbour's KV heads", named(*"kv"), weights=next_kv_heads),
    Fault(
        "shard of the wrong columns",
        "mlp.down_proj.weight",
        weights=reload("w_down", change=wrong.one_column_on),
    ),
    Fault("shard of the wrong rows", named(*"qkv"), weights=qkv_one_on),
    Fault("gate's weights for up's", named("gate", "up"), weights=wrong.gate_for_up),
    Fault("weights slightly off", MLP_WEIGHTS, weights=mlp_off),
    Fault(
        "one weight slightly off", "self_attn.o_proj.weight", weights=reload("w_o", change=wrong.slightly_off)
    ),
    Fault("one weight's last bit", "self_attn.o_proj.weight", weights=last_bit, places=FIRST_RANK),
    # 16 bits
    Fault(
        "sums in 16 bits",
        "mlp.out_partial",
        {"row_parallel": wrong.sum_in_16_bits},
        dtype="bfloat16",
        decode=0,  # a few numbers may be as near by luck
        places=((1, 0, 0), (2, 2, 1)),  # so are sums of a few terms, on more ranks
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
    Fault("RoPE in a layer without", ROPES, always_turned, model="unturned"),
]
