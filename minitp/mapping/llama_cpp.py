"""The arrays of llama.cpp's graphs, and the steps that they are.

Read in llama.cpp of October 2026 (src/llama-graph.cpp and src/models/, as in llama-cpp-python 0.3.36).

A key is the name of an array, in which {i} stands for the number of a layer. Several arrays have the same
name, for example Qcur-0 after the product, after the bias, after the reshape, and after RoPE. A name alone
means the last of them, which is also the one that remains in a dictionary by name. A name with an operation
means an array that this operation has computed, an operation alone any of its arrays, and the name of a
weight the product with it.

Layouts are those of NumPy, which are the reverse of ggml's `ne`.
"""

from minitp.mapping.table import into, out

QUERIES, KEYS, VALUES = "T H d", "T K d", "T K d"


def heads(name, step, letter):
    """Return the arrays before RoPE that are called `name`: products, sums with a bias, and views."""
    joined, split = [out(step, f"T {letter}d")], [out(step, f"T {letter} d")]
    return {f"{name} MUL_MAT": joined, f"{name} ADD": joined, f"{name} RESHAPE": split, f"{name} VIEW": split}


STEPS = {
    "inp_tokens": [out("tokens", "T")],
    "inp_pos": [out("positions", "T")],
    "inp_embd": [out("embed", "T D")],  # the name until 2025
    "embd": [out("embed", "T D")],
    "inp_scaled": [out("embed", "T D")],  # Gemma
    "attn_norm-{i}": [out("attn.norm", "T D")],
    **heads("Qcur-{i}", "attn.q", "H"),
    **heads("Kcur-{i}", "attn.k", "K"),
    **heads("Vcur-{i}", "attn.v", "K"),
    "Vcur-{i}": [out("attn.v", VALUES)],
    "Qcur_normed-{i}": [out("attn.q_norm", QUERIES)],
    "Kcur_normed-{i}": [out("attn.k_norm", KEYS)],
    "Qcur-{i} SCALE": [],  # Phi-3 divides the rotated queries, not the scores
    "Qcur-{i}": [out("attn.q_rope", QUERIES)],
    "Kcur-{i}": [out("attn.k_rope", KEYS)],
    # The cache as attention reads it, with room for more positions; the values are stored transposed.
    "kq-{i}": [into("attn.k_cache", "K S d")],
    "kqv-{i}": [into("attn.v_cache", "K d S")],
    "FLASH_ATTN_EXT": [into("attn.k_cache", "K S d", index=1), into("attn.v_cache", "K S d", index=2)],
    "kq_soft_max-{i}": [out("attn.probs", "H T S")],
    "kqv_out-{i}": [out("attn.context", "T Hd")],
    "attn_out-{i}": [out("attn.out", "T D")],  # the architecture llama; others have no name for it
    "blk.{i}.attn_output.weight": [out("attn.out", "T D")],
    "blk.{i}.attn_output.bias": [out("attn.out", "T D")],
    "attn_post_norm-{i}": [out("attn.post_norm", "T D")],
    "ffn_inp-{i}": [out("attn.residual", "T D")],
    "sa_out-{i}": [out("attn.residual", "T D")],  # Gemma
    "ffn_norm-{i}": [out("mlp.norm", "T D")],
    "ffn_gate-{i}": [out("mlp.gate", "T F")],
    "ffn_gate_b-{i}": [out("mlp.gate", "T F")],  # with a bias
    "ffn_up-{i}": [out("mlp.up", "T F")],
    "ffn_up_b-{i}": [out("mlp.up", "T F")],
    "ffn_swiglu-{i}": [out("mlp.act", "T F")],
    "ffn_geglu-{i}": [out("mlp.act", "T F")],
    "ffn_gate_par-{i}": [out("mlp.act", "T F")],  # the name until 2025
    "ffn_out-{i}": [out("mlp.out", "T D")],
    "ffn_moe_logits-{i}": [out("mlp.router", "T E")],
    "ffn_moe_swiglu-{i}": [out("mlp.experts", "T X F")],  # in the order of ffn_moe_topk-{i} [T, X]
    "ffn_moe_out-{i}": [out("mlp.out", "T D")],
    "ffn_post_norm": [out("mlp.post_norm", "T D")],  # of the layer whose arrays come before it
    "ffn_post_norm-{i}": [out("mlp.post_norm", "T D")],
    "l_out-{i}": [out("mlp.residual", "T D")],
    "result_norm": [out("final_norm", "T D")],
    "result_output": [out("logits", "T V")],
}
PHI3 = {"ffn_up-{i}": [out("mlp.gate mlp.up", "T F")]}  # one product has both, in this order

# Steps by the name of a product or of its weight. ggml rounds an input of a product to the type of the other
# one, the weight or the cache: to F16 or BF16, and to 8 bits if it is quantized.
PRODUCTS = {
    "kq-{i}": ["attn.probs"],
    "kqv-{i}": ["attn.context"],
    "blk.{i}.attn_q.weight": ["attn.q"],
    "blk.{i}.attn_k.weight": ["attn.k"],
    "blk.{i}.attn_v.weight": ["attn.v"],
    "blk.{i}.attn_qkv.weight": ["attn.q", "attn.k", "attn.v"],
    "blk.{i}.attn_output.weight": ["attn.out"],
    "blk.{i}.ffn_gate.weight": ["mlp.gate"],
    "blk.{i}.ffn_up.weight": ["mlp.gate", "mlp.up"],
    "blk.{i}.ffn_down.weight": ["mlp.out"],
    "blk.{i}.ffn_gate_inp.weight": ["mlp.router"],
    "blk.{i}.ffn_gate_exps.weight": ["mlp.experts"],
    "blk.{i}.ffn_up_exps.weight": ["mlp.experts"],
    "blk.{i}.ffn_gate_up_exps.weight": ["mlp.experts"],
    "blk.{i}.ffn_down_exps.weight": ["mlp.out"],
    "output.weight": ["logits"],
    "token_embd.weight": ["logits"],
}
# Steps that ggml computes in F16 on a CPU: it looks up gelu in a table of all F16 numbers.
IN_F16 = {"ffn_geglu-{i}": ["mlp.act"], "FLASH_ATTN_EXT": ["attn.context"]}


def llama_cpp_steps(model_type):
    """Return the steps of llama.cpp's arrays in models of a model_type: name -> list of Source."""
    return STEPS | PHI3 if model_type == "phi3" else STEPS
