"""The arrays of llama.cpp's graphs, and the steps that they are.

Read in llama.cpp of October 2026 (src/llama-graph.cpp and src/models/, as in llama-cpp-python 0.3.36).

A key is the name of an array, in which {i} stands for the number of a layer. Several arrays have the same
name, for example Qcur-0 after the product, after the bias, after the reshape, and after RoPE. A name alone
means the last of them, which is also the one that remains in a dictionary by name. A name with an operation
means an array that this operation has computed. The name of a weight means the product with it.

Layouts are those of NumPy, which are the reverse of ggml's `ne`.
"""

from minitp.mapping.table import INTERLEAVED, OtherEngine, into, out

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
# One product has gate and up, in this order.
PHI3 = {"ffn_up-{i}": [out("mlp.gate mlp.up", "T F")]}
F16_PRODUCTS = "with a matrix in F16, ggml rounds the input of the product to F16; with a quantized one, to Q8"
LLAMA_CPP = OtherEngine(
    "llama.cpp",
    STEPS,
    rope=INTERLEAVED,  # architectures llama and granite; the others' heads are half-split
    roundings=dict.fromkeys(
        ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.gate", "mlp.up", "mlp.out", "logits"), F16_PRODUCTS
    )
    | dict.fromkeys(("attn.k_cache", "attn.v_cache"), "the cache is in F16, unless type_k and type_v are F32"),
)
