"""The steps that copy or look up: they add nothing, so that no other order of a sum can change their bits.

A cache in another dtype is a copy, too: each key or value is converted by itself, always to the same bits.
Another embedding multiplier or dtype is likewise the same for each element.
"""

COPIES = {  # step -> (steps that it copies, the reason)
    "tokens": ((), "it is an input of the run"),
    "positions": ((), "it is an input of the run"),
    "embed_partial": ((), "its rows are rows of the embedding table, or zero"),
    "embed": ((), "its rows are rows of the embedding table"),  # the other ranks' terms are zero
    "attn.k_cache": (("attn.k_rope",), "its rows are those of attn.k_rope"),
    "attn.v_cache": (("attn.v",), "its rows are those of attn.v"),
    "logits": (("logits_partial",), "its columns are those of logits_partial"),
}
WITH_ZEROS = "embed"  # a sum with the zeros of other ranks: exact, but -0.0 + 0.0 is 0.0


def reason_of_copy(step):
    """Return why a step cannot round, as a line for the reasons."""
    return f"not rounding: this step only copies ({COPIES[step][1]})"
