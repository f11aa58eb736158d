"""The fields of config.json that no family reads, and what their values mean."""

# Fields that would change the computation, with the only value that is supported.
ONLY_VALUE = {
    "rope_interleaved": False,
    "add_cross_attention": False,
    "use_bidirectional_attention": False,
    "decoder_sparse_step": 1,  # all layers have experts
    "mlp_only_layers": [],
}

# Fields that do not affect the forward pass, whatever their value.
NO_EFFECT = {
    "_name_or_path", "_attn_implementation", "architectures", "model_type", "transformers_version",
    "transformers.js_config", "use_cache", "initializer_range", "attention_dropout", "pretraining_tp",
    "unsloth_version", "unsloth_fixed", "is_llama_config", "pad_token_id", "unk_token_id", "return_dict",
    "output_hidden_states", "output_attentions", "torchscript", "use_bfloat16", "chunk_size_feed_forward",
    "problem_type", "id2label", "label2id", "num_labels", "finetuning_task", "task_specific_params",
    "name_or_path", "auto_map", "attn_implementation", "_attn_implementation_autoset", "sep_token_id",
    "decoder_start_token_id", "is_decoder", "tie_encoder_decoder", "tokenizer_class", "prefix",
    "tf_legacy_loss", "sliding_window_size", "resid_pdrop", "embd_pdrop", "output_router_logits",
    "router_aux_loss_coef", "router_jitter_noise", "max_sequence_length", "_sliding_window_pattern",
    # Sampling, for which minitp has its own options.
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "length_penalty",
    "repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens", "cache_implementation",
}  # fmt: skip

# Fields of other families or of all of them, with the value that turns a feature off. Many files have it.
TURNED_OFF = {
    "attention_bias": False,
    "mlp_bias": False,
    "lm_head_bias": False,
    "use_mrope": False,
    "use_qk_norm": False,
    "use_sliding_window": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "full_attn_mod": 1,  # of Phi-4-mini's own code, like the next one
    "interpolate_factor": 1,
}
