"""Configs of Llama models with given shapes."""

from minitp.loading.config import parse_config


def llama(hidden, ffn, layers, heads, kv_heads, vocabulary, **more):
    fields = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn, **more}
    fields |= {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return parse_config(fields | {"vocab_size": vocabulary, "max_position_embeddings": 4096}, "test")
