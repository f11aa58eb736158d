"""Record Hugging Face transformers with a fault in it, for the tests of `minitp judge`.

    pip install torch==2.13.0 transformers==5.23.0 .      (CPU; the versions of the committed files)
    python tests/support/make_faulty_recordings.py [NAME ..]

Each fault changes a model of tests/goldens in memory. A recording has the pass of a prompt, in float32.
faulty_recordings.json lists the model, the step that must be blamed first, and words of the explanation.
"""

import copy
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.models.granite import modeling_granite as granite
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral

import minitp.probe

TESTS = Path(__file__).resolve().parents[1]
FOLDER, INDEX = TESTS / "support" / "faulty_recordings", TESTS / "support" / "faulty_recordings.json"
PROMPT = [3, 50, 7, 7, 91]


def forward_of(module, function):
    """Replace the forward method of one module."""
    module.forward = function


def normalized(x, eps, dim=-1):
    return x * torch.rsqrt(x.pow(2).mean(dim, keepdim=True) + eps)


def no_weight(model):
    norm = model.model.layers[1].input_layernorm
    forward_of(norm, lambda x: normalized(x, norm.variance_epsilon))


def layer_norm(model):
    norm = model.model.layers[1].post_attention_layernorm
    forward_of(norm, lambda x: norm.weight * normalized(x - x.mean(-1, keepdim=True), norm.variance_epsilon))


def eps_outside(model):
    norm = model.model.layers[0].input_layernorm
    forward_of(
        norm, lambda x: norm.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + norm.variance_epsilon)
    )


def other_eps(model):
    model.model.layers[0].input_layernorm.variance_epsilon = 1e-3


def no_final_norm(model):
    forward_of(model.model.norm, lambda x: x)


def no_k_bias(model):
    model.model.layers[1].self_attn.k_proj.bias.data.zero_()


def interleaved_rows(model):
    attention = model.model.layers[0].self_attn
    rows, columns = attention.q_proj.weight.shape
    by_head = attention.q_proj.weight.data.reshape(-1, 2, attention.head_dim // 2, columns)
    attention.q_proj.weight.data = by_head.transpose(1, 2).reshape(rows, columns)


def gate_is_up(model):
    mlp = model.model.layers[1].mlp
    mlp.gate_proj.weight.data, mlp.up_proj.weight.data = mlp.up_proj.weight.data, mlp.gate_proj.weight.data


def v_of_layer_0(model):
    model.model.layers[1].self_attn.v_proj.weight.data = model.model.layers[0].self_attn.v_proj.weight.data


def o_of_layer_0(model):
    model.model.layers[1].self_attn.o_proj.weight.data = model.model.layers[0].self_attn.o_proj.weight.data


def embedding_as_head(model):
    model.lm_head.weight.data = model.model.embed_tokens.weight.data


def rope_function(change):
    """Return a fault that replaces the RoPE function of Llama by change(original)."""

    def fault(model):
        llama.apply_rotary_pos_emb = change(llama.apply_rotary_pos_emb)

    return fault


def in_pairs(original):
    def rotated(q, k, cos, sin, unsqueeze_dim=1):
        def turn(x):
            half = x.shape[-1] // 2
            c, s = cos.unsqueeze(1)[..., :half], sin.unsqueeze(1)[..., :half]
            even, odd = x[..., 0::2], x[..., 1::2]
            return torch.stack((even * c - odd * s, odd * c + even * s), dim=-1).flatten(-2)

        return turn(q), turn(k)

    return rotated


def k_not_rotated(original):
    return lambda q, k, cos, sin, unsqueeze_dim=1: (original(q, k, cos, sin)[0], k)


def backwards(original):
    return lambda q, k, cos, sin, unsqueeze_dim=1: original(q, k, cos, -sin)


def moved_positions(model):
    rotary = model.model.rotary_emb
    original = rotary.forward
    forward_of(rotary, lambda x, position_ids: original(x, position_ids + 1))


def restarting_positions(model):
    rotary = model.model.rotary_emb
    original = rotary.forward
    forward_of(rotary, lambda x, position_ids: original(x, position_ids - position_ids[:, :1]))


def other_theta(model):
    size = model.model.rotary_emb.inv_freq.shape[0]
    model.model.rotary_emb.inv_freq = 1e6 ** -(torch.arange(size, dtype=torch.float32) / size)


def attention_function(module, change):
    """Return a fault that replaces the attention function of a module of transformers by change(original)."""

    def fault(model):
        module.eager_attention_forward = change(module.eager_attention_forward)

    return fault


def without_mask(original):
    return lambda module, q, k, v, mask, **rest: original(module, q, k, v, None, **rest)


def sees_next(original):
    def attend(module, q, k, v, mask, **rest):
        if mask is not None and mask.shape[-1] > 1:
            mask = torch.cat((mask[..., :1] * 0, mask[..., :-1]), dim=-1)
        return original(module, q, k, v, mask, **rest)

    return attend


def no_window(original):
    def attend(module, q, k, v, mask, **rest):
        size, keys = q.shape[2], k.shape[2]
        plain = torch.full((size, keys), float("-inf")).triu(keys - size + 1)[None, None]
        return original(module, q, k, v, plain, **rest)

    return attend


def unscaled(model):
    for layer in model.model.layers:
        layer.self_attn.scaling = 1.0


def scaled_by_d(model):
    for layer in model.model.layers:
        layer.self_attn.scaling = 1 / layer.self_attn.head_dim


def tiled_heads(model):
    llama.repeat_kv = lambda x, n: x.repeat(1, n, 1, 1)


def joined_by_dimension(model):
    attention = model.model.layers[0].self_attn

    def change(module, args):
        x = args[0]
        return (x.reshape(*x.shape[:2], -1, attention.head_dim).transpose(2, 3).reshape(x.shape),)

    attention.o_proj.register_forward_pre_hook(change)


def doubled_attention(model):
    model.model.layers[1].self_attn.register_forward_hook(lambda module, args, out: (2 * out[0], *out[1:]))


def no_mlp(model):
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: 0 * out)


def activation(function):
    def fault(model):
        model.model.layers[1].mlp.act_fn = function

    return fault


def no_score_cap(model):
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None


def no_logit_cap(model):
    model.config.final_logit_softcapping = None


def no_embedding_scale(model):
    model.model.embed_tokens.embed_scale = torch.tensor(1.0)


def weight_not_plus_one(model):
    norm = model.model.layers[0].input_layernorm
    forward_of(norm, lambda x: normalized(x, norm.eps) * norm.weight)


def no_post_norm(model):
    forward_of(model.model.layers[1].post_feedforward_layernorm, lambda x: x)


def no_q_norm(model):
    forward_of(model.model.layers[0].self_attn.q_norm, lambda x: x)


def no_residual_multiplier(model):
    model.model.layers[0].residual_multiplier = 1.0


def no_logits_scaling(model):
    model.config.logits_scaling = 1.0


def experts_of(model):
    """Return the experts of layer 1, whose gate_up_proj is [E, 2 F, D] and down_proj [E, D, F]."""
    return model.model.layers[1].mlp.experts


def expert_gate_is_up(model):
    weight = experts_of(model).gate_up_proj.data
    weight[1] = torch.cat(weight[1].chunk(2)[::-1])


def expert_2_is_3(model):
    experts = experts_of(model)
    for weight in (experts.gate_up_proj.data, experts.down_proj.data):
        weight[2] = weight[3]


def down_of_expert_0(model):
    weight = experts_of(model).down_proj.data
    weight[3] = weight[0]


def experts_reversed(model):
    experts = experts_of(model)
    experts.gate_up_proj.data, experts.down_proj.data = (
        weight.data.flip(0) for weight in (experts.gate_up_proj, experts.down_proj)
    )


def expert_left_out(model):
    experts_of(model).down_proj.data[2] = 0


def shares_over_all(model):
    gate = model.model.layers[1].mlp.gate
    forward = gate.forward

    def not_normalized(x):
        logits, _, chosen = forward(x)
        return logits, logits.softmax(-1).gather(-1, chosen), chosen

    gate.forward = not_normalized


def one_expert_too_few(model):
    model.model.layers[1].mlp.gate.top_k -= 1


def shares_in_wrong_order(model):
    gate = model.model.layers[1].mlp.gate
    forward = gate.forward

    def exchanged(x):
        logits, shares, chosen = forward(x)
        return logits, shares.flip(-1), chosen

    gate.forward = exchanged


def router_of_layer_0(model):
    model.model.layers[1].mlp.gate.weight.data = model.model.layers[0].mlp.gate.weight.data


def other_scale(model):
    model.model.layers[0].self_attn.scaling *= 1.3


def mask_with(change):
    """Return a fault that replaces the mask of Llama's attention, 0 or -inf, by change(mask)."""

    def wrap(original):
        return lambda module, q, k, v, mask, **rest: original(module, q, k, v, change(mask), **rest)

    return attention_function(llama, wrap)


def strict(mask):
    """Hide the own key, too, with the smallest number, as `masked_fill` does."""
    hidden = torch.triu(torch.ones_like(mask, dtype=torch.bool))
    return torch.zeros_like(mask).masked_fill(hidden, torch.finfo(mask.dtype).min)


def minus_10(mask):
    return torch.zeros_like(mask).masked_fill(mask < 0, -10.0)


def softmax_in_float16(original):
    def attend(module, q, k, v, mask, scaling, **rest):
        k, v = (llama.repeat_kv(x, module.num_key_value_groups) for x in (k, v))
        scores = q @ k.transpose(2, 3) * scaling + mask
        probs = scores.half().softmax(-1).float()
        return (probs @ v).transpose(1, 2).contiguous(), probs

    return attend


def cosines_in_bfloat16(original):
    return lambda q, k, cos, sin, unsqueeze_dim=1: original(
        q, k, cos.bfloat16().float(), sin.bfloat16().float()
    )


def down_in_8_bits(model):
    weight = model.model.layers[0].mlp.down_proj.weight
    scale = weight.data.abs().amax(1, keepdim=True) / 127
    weight.data = (weight.data / scale).round() * scale


def keys_in_float8(original):
    """Round what RoPE returns, and so what the cache holds."""

    def rotated(q, k, cos, sin, unsqueeze_dim=1):
        q, k = original(q, k, cos, sin)
        return q, k.to(torch.float8_e4m3fn).float()

    return rotated


def llama3_context(model):
    config = copy.deepcopy(model.config)
    config.rope_parameters["original_max_position_embeddings"] = 8192
    model.model.rotary_emb.inv_freq = llama.LlamaRotaryEmbedding(config).inv_freq


def grouped_by_kv_head(model):
    """Give q, k and v the rows of a joined matrix in Megatron's order, cut as if it were in the plain one."""
    attention = model.model.layers[0].self_attn
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    groups, sizes = model.config.num_key_value_heads, [len(part.weight) for part in parts]
    joined = torch.cat([part.weight.data.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)
    for part, rows in zip(parts, joined.split(sizes), strict=True):
        part.weight.data = rows.clone()


def experts_overwritten(model):
    experts = model.model.layers[1].mlp.experts

    def forward(x, chosen, shares):
        out = torch.zeros_like(x)
        for e in range(len(experts.down_proj)):
            tokens, places = torch.where(chosen == e)
            gate, up = (x[tokens] @ experts.gate_up_proj[e].T).chunk(2, dim=-1)
            y = (experts.act_fn(gate) * up) @ experts.down_proj[e].T
            out[tokens] = shares[tokens, places, None] * y
        return out

    forward_of(experts, forward)


def softmax_over_tokens(model):
    gate = model.model.layers[1].mlp.gate

    def forward(x):
        logits = x @ gate.weight.T
        shares, chosen = logits.softmax(0).topk(gate.top_k)
        return logits, shares / shares.sum(-1, keepdim=True), chosen

    forward_of(gate, forward)


# name -> the model, the fault, the step that is wrong first, and words of the explanation
FAULTS = {
    "norm without weight": ("llama2", no_weight, "layers.1.attn.norm", "without its weight"),
    "layer norm": ("llama2", layer_norm, "layers.1.mlp.norm", "as in LayerNorm"),
    "eps outside": ("llama2", eps_outside, "layers.0.attn.norm", "outside the root"),
    "eps": ("llama2", other_eps, "layers.0.attn.norm", "eps is 0.001, not 1e-05"),
    "no final norm": ("llama2", no_final_norm, "final_norm", "not normalized"),
    "bias of k": ("qwen2", no_k_bias, "layers.1.attn.k", "the bias is left out"),
    "rows of q": ("llama2", interleaved_rows, "layers.0.attn.q", "interleaved, not half-split"),
    "gate is up": ("llama2", gate_is_up, "layers.1.mlp.gate", "the weight is that of up"),
    "v of layer 0": ("llama2", v_of_layer_0, "layers.1.attn.v", "the weight is that of layer 0"),
    "o of layer 0": ("llama2", o_of_layer_0, "layers.1.attn.out", "the weight is that of layer 0"),
    "tied": ("llama2", embedding_as_head, "logits", "the embedding table, although"),
    "rope in pairs": ("llama2", rope_function(in_pairs), "layers.0.attn.q_rope", "rotated in pairs"),
    "k not rotated": ("llama2", rope_function(k_not_rotated), "layers.0.attn.k_rope", "not rotated"),
    "rope backwards": ("llama2", rope_function(backwards), "layers.0.attn.q_rope", "opposite direction"),
    "positions": ("llama2", moved_positions, "layers.0.attn.q_rope", "one too large"),
    "positions restart": ("llama2", restarting_positions, "layers.0.attn.q_rope", "begin at 0 in this pass"),
    "theta": ("llama2", other_theta, "layers.0.attn.q_rope", "rope_theta 1e+06"),
    "no mask": ("llama2", attention_function(llama, without_mask), "layers.0.attn.probs", "there is no mask"),
    "sees next": (
        "llama2",
        attention_function(llama, sees_next),
        "layers.0.attn.probs",
        "the key after its own",
    ),
    "no window": (
        "mistral-v01",
        attention_function(mistral, no_window),
        "layers.0.attn.probs",
        "the sliding window is ignored",
    ),
    "unscaled": ("llama2", unscaled, "layers.0.attn.probs", "the scores are not scaled"),
    "scaled by d": ("llama2", scaled_by_d, "layers.0.attn.probs", "not by its root"),
    "tiled heads": ("llama2", tiled_heads, "layers.0.attn.probs", "tiled (h mod K)"),
    "joined by dimension": ("llama2", joined_by_dimension, "layers.0.attn.context", "joined as [d, H]"),
    "attention doubled": ("llama2", doubled_attention, "layers.1.attn.residual", "output is added twice"),
    "mlp left out": ("llama2", no_mlp, "layers.0.mlp.residual", "output is left out"),
    "gelu": (
        "llama2",
        activation(torch.nn.GELU(approximate="tanh")),
        "layers.1.mlp.act",
        "gelu in place of silu",
    ),
    "relu": ("llama2", activation(torch.nn.ReLU()), "layers.1.mlp.act", "relu in place of"),
    "no score cap": ("gemma2", no_score_cap, "layers.0.attn.probs", "soft cap of the scores is left out"),
    "no logit cap": ("gemma2", no_logit_cap, "logits", "soft cap of the logits is left out"),
    "no embedding scale": ("gemma2", no_embedding_scale, "embed", "scale of the embedding"),
    "not 1 + w": ("gemma2", weight_not_plus_one, "layers.0.attn.norm", "the weight is w, not 1 + w"),
    "no post norm": ("gemma2", no_post_norm, "layers.1.mlp.post_norm", "not normalized"),
    "no q norm": ("qwen3", no_q_norm, "layers.0.attn.q_norm", "not normalized"),
    "no residual multiplier": ("granite", no_residual_multiplier, "layers.0.attn.residual", "is left out"),
    "no logits scaling": ("granite", no_logits_scaling, "logits", "logits_scaling"),
    "expert 1 gate is up": ("mixtral", expert_gate_is_up, "layers.1.mlp.out", "gate and up of expert 1"),
    "expert 2 is 3": ("mixtral", expert_2_is_3, "layers.1.mlp.out", "expert 2 has the weights of expert 3"),
    "down of expert 0": (
        "mixtral",
        down_of_expert_0,
        "layers.1.mlp.out",
        "3 has the down matrix of expert 0",
    ),
    "experts reversed": ("mixtral", experts_reversed, "layers.1.mlp.out", "experts are in the reverse order"),
    "expert left out": ("mixtral", expert_left_out, "layers.1.mlp.out", "expert 2 is left out"),
    "shares over all": ("mixtral", shares_over_all, "layers.1.mlp.out", "are normalized over all experts"),
    "one expert too few": ("qwen3-moe", one_expert_too_few, "layers.1.mlp.out", "2 experts per token, not 3"),
    "shares in wrong order": ("mixtral", shares_in_wrong_order, "layers.1.mlp.out", "in the wrong order"),
    "score scale": ("llama2", other_scale, "layers.0.attn.probs", "scaled by 0.530723, not by 0.408248"),
    "strict mask": ("llama2", mask_with(strict), "layers.0.attn.probs", "a query does not see its own key"),
    "weak mask": ("llama2", mask_with(minus_10), "layers.0.attn.probs", "the mask adds -10 to the masked"),
    "softmax in float16": (
        "llama2",
        attention_function(llama, softmax_in_float16),
        "layers.0.attn.probs",
        "rounded to float16: the scores and the result",
    ),
    "rope in bfloat16": (
        "llama2",
        rope_function(cosines_in_bfloat16),
        "layers.0.attn.q_rope",
        "rounded to bfloat16: cosine and sine",
    ),
    "down in 8 bits": ("llama2", down_in_8_bits, "layers.0.mlp.out", "for each row: the weight"),
    "keys in float8": (
        "llama2",
        rope_function(keys_in_float8),
        "layers.0.attn.k_rope",
        "rounded to float8_e4m3fn: the result",
    ),
    "llama3 context": (
        "llama3",
        llama3_context,
        "layers.0.attn.q_rope",
        "original_max_position_embeddings of llama3's scaling is 8192, not 128",
    ),
    "exact gelu": ("gemma2", activation(torch.nn.GELU()), "layers.1.mlp.act", "gelu is exact (erf)"),
    "grouped by KV head": (
        "llama2",
        grouped_by_kv_head,
        "layers.0.attn.q",
        "q, k and v are grouped by KV head",
    ),
    "experts overwritten": (
        "mixtral",
        experts_overwritten,
        "layers.1.mlp.out",
        "output overwrites those of the experts before it",
    ),
    "softmax over tokens": (
        "mixtral",
        softmax_over_tokens,
        "layers.1.mlp.out",
        "the softmax is over the tokens",
    ),
    "router of layer 0": ("mixtral", router_of_layer_0, "layers.1.mlp.router", "weight is that of layer 0"),
}
PATCHED = [(module, name, getattr(module, name)) for module in (llama, mistral, granite)
           for name in ("apply_rotary_pos_emb", "eager_attention_forward", "repeat_kv")]  # fmt: skip


def main():
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or FAULTS:
        golden, fault, _, _ = FAULTS[name]
        model = AutoModelForCausalLM.from_pretrained(
            TESTS / "goldens" / golden, dtype=torch.float32, experts_implementation="eager"
        ).eval()
        model.config._name_or_path = golden
        model.set_attn_implementation("eager")
        fault(model)
        path = FOLDER / f"{name.replace(' ', '-').replace('+', 'plus')}.safetensors"
        with torch.no_grad(), minitp.probe.record(model, path):
            prompt = PROMPT * 2 if golden == "mistral-v01" else PROMPT  # longer than its window
            output = model(torch.tensor([prompt]), use_cache=True)
            if fault is restarting_positions:  # right in the first pass
                token = output.logits[0, -1].argmax()[None, None]
                model(token, past_key_values=output.past_key_values, use_cache=True)
        for module, function, original in PATCHED:
            setattr(module, function, original)
        print(path)
    index = {
        name: {
            "file": f"{name.replace(' ', '-').replace('+', 'plus')}.safetensors",
            "model": golden,
            "step": step,
            "words": words,
        }
        for name, (golden, _, step, words) in FAULTS.items()
    }
    INDEX.write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    main()
