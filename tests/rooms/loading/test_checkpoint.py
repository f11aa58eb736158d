"""Tests of checkpoints, config.json, random weights, and the messages for unsupported ones."""

import json
import math
import re
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import CONFIG, write_tiny

from minitp.device import open_device
from minitp.errors import InputError
from minitp.loading.config import parse_config, read_config
from minitp.loading.random_weights import BLOCK, RandomWeights
from minitp.loading.source import open_model
from minitp.loading.weights import Loader
from minitp.oracle import Oracle

MIXTRAL = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
TENSORS = [
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.1.post_attention_layernorm.weight",
    "model.layers.1.self_attn.k_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
]


@pytest.fixture
def directory(tmp_path):
    return write_tiny(tmp_path / "tiny", tokenizer=False)


def change_tensors(directory, change):
    """Rewrite model.safetensors after change(its tensors as a dict)."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)


def shard_files(directory):
    """Split model.safetensors into two files with an index; return the index as an object."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    half = len(tensors) // 2
    for name, part in zip(names, (sorted(tensors)[:half], sorted(tensors)[half:]), strict=True):
        save_file({tensor: tensors[tensor] for tensor in part}, directory / name)
    index = {
        "metadata": {"total_size": sum(values.nbytes for values in tensors.values())},
        "weight_map": {tensor: names[i >= half] for i, tensor in enumerate(sorted(tensors))},
    }
    write_index(directory, index)
    return index


def write_index(directory, index):
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def load(directory, tp=3, layers=None):
    """Load all ranks' Weights, with all checks."""
    source = open_model(str(directory), tp, layers)
    device = open_device("float32")
    return [Loader(source.plan, rank, source.tensors, device).load() for rank in range(tp)]


def assert_rejected(call, *words):
    """Check that call() raises an InputError whose one-line message contains all `words`."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in message
    for word in words:
        assert str(word) in message


def assert_same_weights(all_weights, expected):
    for weights, expected_weights in zip(all_weights, expected, strict=True):
        for array in ("embed", "lm_head", "final_norm"):
            np.testing.assert_array_equal(getattr(weights, array), getattr(expected_weights, array))
        for layer, expected_layer in zip(weights.layers, expected_weights.layers, strict=True):
            for array, values in vars(layer).items():
                np.testing.assert_array_equal(values, getattr(expected_layer, array))


# --- tensors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TENSORS)
def test_missing_tensor(directory, name):
    shape = list(load_file(directory / "model.safetensors")[name].shape)
    change_tensors(directory, lambda tensors: tensors.pop(name))
    assert_rejected(lambda: load(directory), directory, name, "missing", f"expected shape {shape}")


def test_tied_model_needs_no_lm_head(tmp_path):
    write_tiny(tmp_path, tokenizer=False, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    for weights in load(tmp_path):
        np.testing.assert_array_equal(weights.lm_head, weights.embed.T)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.1.self_attn.q_proj.bias",  # attention_bias is false
        "model.layers.2.mlp.up_proj.weight",  # two layers in config.json
        "score.weight",
    ],
)
def test_unexpected_tensor(directory, name):
    change_tensors(directory, lambda tensors: tensors.update({name: np.ones(8, np.float32)}))
    assert_rejected(lambda: load(directory), directory / "model.safetensors", name, "not part of the model")


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.self_attn.k_proj.weight", (32, 16), [16, 32]),  # transposed
        ("model.layers.1.mlp.down_proj.weight", (48, 32), [32, 48]),
        ("model.embed_tokens.weight", (257, 32), [258, 32]),
        ("lm_head.weight", (259, 32), [258, 32]),
        ("model.norm.weight", (31,), [32]),
        ("model.norm.weight", (1, 32), [32]),
        ("model.layers.1.self_attn.q_proj.weight", (1024,), [32, 32]),
        ("model.layers.1.self_attn.q_proj.weight", (), [32, 32]),
    ],
)
def test_misshaped_tensor(directory, name, shape, expected):
    change_tensors(directory, lambda tensors: tensors.update({name: np.ones(shape, np.float32)}))
    words = name, f"shape {list(shape)}", f"expected {expected}"
    assert_rejected(lambda: load(directory), directory / "model.safetensors", *words)


@pytest.mark.parametrize(
    ("dtype", "said"),
    [(np.int8, "I8"), (np.int32, "I32"), (np.uint8, "U8"), (np.float64, "F64"), (bool, "BOOL")],
)
def test_unsupported_dtype(directory, dtype, said):
    change_tensors(directory, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].astype(dtype)}))
    words = Q_PROJ, f"dtype {said}", "expected one of F32, F16, BF16"
    assert_rejected(lambda: load(directory), directory / "model.safetensors", *words)


def test_dtypes_may_be_mixed(directory):
    def to_float16_and_back(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(np.float16)

    change_tensors(directory, to_float16_and_back)
    expected = load(directory)
    change_tensors(directory, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].astype(np.float32)}))
    assert_same_weights(load(directory), expected)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.{}.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.rotary_emb.original_inv_freq",
        "model.layers.{}.self_attn.rotary_emb.cos_cached",
        "model.layers.{}.attn.masked_bias",
        "model.layers.{}.attention.bias",
        "model.position_ids",
        "num_batches_tracked",
    ],
)
def test_buffers_are_passed_over(directory, name):
    expected = load(directory)
    buffers = {name.format(i): np.ones(4, np.int64) for i in range(2)}
    change_tensors(directory, lambda tensors: tensors.update(buffers))
    assert_same_weights(load(directory), expected)


@pytest.mark.parametrize(
    ("suffix", "dtype", "said"),
    [
        ("qweight", np.int32, "GPTQ or AWQ"),
        ("weight_packed", np.int32, "compressed-tensors"),
        ("weight", np.int8, "dtype I8"),
        ("weight", ml_dtypes.float8_e4m3fn, "dtype F8_E4M3"),
    ],
)
def test_quantized_tensors_without_a_word_in_the_config(directory, suffix, dtype, said):
    name = f"model.layers.1.self_attn.q_proj.{suffix}"

    def quantize(tensors):
        tensors[name] = tensors.pop(Q_PROJ).astype(dtype)

    change_tensors(directory, quantize)
    with pytest.raises(InputError) as error:
        load(directory)
    assert name in str(error.value)
    assert said in str(error.value)
    assert str(error.value).endswith("use an unquantized checkpoint of this model, or a GGUF file")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fields", [{"attention_bias": True}, MIXTRAL], ids=["biases", "experts"])
def test_weights_lie_in_one_piece_of_memory(tmp_path, fields, tied, dtype):
    """Check that each array starts at a cache line, that none overlap, and that each is counted once."""
    source = open_model(str(write_tiny(tmp_path, tie_word_embeddings=tied, **fields)), 3)
    weights = Loader(source.plan, 1, source.tensors, open_device(dtype)).load()
    arrays = [weights.lm_head, weights.final_norm, *([] if tied else [weights.embed])]
    holders = [holder for layer in weights.layers for holder in (layer, *layer.experts)]
    arrays += [a for holder in holders for a in vars(holder).values() if isinstance(a, np.ndarray)]
    extents = sorted((array.ctypes.data, array.nbytes) for array in arrays)
    assert all(start % 64 == 0 for start, _ in extents)
    assert all(start + n <= after < start + n + 64 for (start, n), (after, _) in pairwise(extents))
    assert weights.nbytes == sum(array.nbytes for array in arrays)
    assert np.shares_memory(weights.embed, weights.lm_head) == tied


def test_tied_model_with_the_same_lm_head_in_its_file(tmp_path):
    write_tiny(tmp_path, tokenizer=False, tie_word_embeddings=True)
    expected = load(tmp_path)
    copy = "model.embed_tokens.weight"
    change_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors[copy].copy()}))
    assert_same_weights(load(tmp_path), expected)


@pytest.mark.parametrize("row", [0, 100, 257])  # rows of the first, second and third rank
def test_tied_model_with_another_lm_head_in_its_file(tmp_path, row):
    write_tiny(tmp_path, tokenizer=False, tie_word_embeddings=True)

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["lm_head.weight"][row, 31] += 0.5

    change_tensors(tmp_path, add)
    words = "lm_head.weight", "model.embed_tokens.weight", "tie_word_embeddings"
    assert_rejected(lambda: load(tmp_path), tmp_path / "model.safetensors", *words)


def test_tied_model_with_a_misshaped_lm_head_in_its_file(tmp_path):
    write_tiny(tmp_path, tokenizer=False, tie_word_embeddings=True)
    shorter = np.ones((250, 32), np.float32)
    change_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": shorter}))
    assert_rejected(lambda: load(tmp_path), tmp_path / "model.safetensors", "lm_head.weight")


def test_layers_option_skips_later_layers(directory):
    expected = load(directory)
    for weights in expected:
        del weights.layers[1:]
    change_tensors(directory, lambda tensors: tensors.update({Q_PROJ: np.ones(3, np.int8)}))
    assert_same_weights(load(directory, layers=1), expected)
    assert_rejected(lambda: load(directory, layers=2), Q_PROJ)


def test_layers_option_still_rejects_layers_beyond_the_config(directory):
    name = "model.layers.2.mlp.up_proj.weight"
    change_tensors(directory, lambda tensors: tensors.update({name: np.ones((48, 32), np.float32)}))
    assert_rejected(lambda: load(directory, layers=1), name)


@pytest.mark.parametrize("layers", [0, 3, -1])
def test_layers_out_of_range(directory, layers):
    assert_rejected(lambda: load(directory, layers=layers), f"--layers {layers}", directory, "has 2 layers")


# --- files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])  # bytes to keep: none, .., half, all but one
def test_truncated_file(directory, keep):
    path = directory / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep == 0.5 else keep])
    assert_rejected(lambda: load(directory), path, "truncated")


def test_file_with_trailing_bytes(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"more")
    assert_rejected(lambda: load(directory), path)


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 123456\n",
        b"PK\x03\x04" + bytes(1000),
        (5).to_bytes(8, "little") + b"[1,2]",
        bytes(range(256)) * 8,
    ],
)
def test_file_of_another_format(directory, content):
    path = directory / "model.safetensors"
    path.write_bytes(content)
    assert_rejected(lambda: load(directory), path, "not a safetensors file")


def test_directory_in_place_of_the_file(directory):
    path = directory / "model.safetensors"
    path.unlink()
    path.mkdir()
    assert_rejected(lambda: load(directory), path)


def test_no_weights(directory):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"pickle")
    assert_rejected(lambda: load(directory), directory, "PyTorch's format (pytorch_model.bin)", "safetensors")


def test_several_files(directory):
    expected = load(directory)
    shard_files(directory)
    assert_same_weights(load(directory), expected)


def test_indexed_file_is_missing(directory):
    shard_files(directory)
    missing = directory / "model-00002-of-00002.safetensors"
    missing.unlink()
    assert_rejected(lambda: load(directory), missing, "listed in the index, but missing")


def test_indexed_tensor_is_missing(directory):
    index = shard_files(directory)
    wrong = "model-00002-of-00002.safetensors"
    name = next(tensor for tensor, file in index["weight_map"].items() if file != wrong)
    index["weight_map"][name] = wrong
    write_index(directory, index)
    words = name, "missing", "model.safetensors.index.json"
    assert_rejected(lambda: load(directory), directory / wrong, *words)


def test_index_decides_between_two_files_with_the_same_tensor(directory):
    expected = load(directory)
    index = shard_files(directory)
    name = next(iter(index["weight_map"]))
    assert index["weight_map"][name] == "model-00001-of-00002.safetensors"
    other = directory / "model-00002-of-00002.safetensors"
    tensors = load_file(other)
    other.unlink()
    save_file({**tensors, name: load_file(directory / index["weight_map"][name])[name] + 1}, other)
    assert_same_weights(load(directory), expected)


@pytest.mark.parametrize(
    "index",
    [{}, [], {"weight_map": []}, {"weight_map": {Q_PROJ: 3}}, {"weight_map": {Q_PROJ: None}}],
)
def test_malformed_index(directory, index):
    shard_files(directory)
    write_index(directory, index)
    assert_rejected(lambda: load(directory), directory / "model.safetensors.index.json", "expected")


def test_broken_index(directory):
    shard_files(directory)
    path = directory / "model.safetensors.index.json"
    path.write_text(path.read_text()[:-5])
    assert_rejected(lambda: load(directory), path, "not valid JSON")


# --- config.json ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe{}", b'{"model_type": "llama"', b"vocab_size: 3"])
def test_broken_config(directory, content):
    (directory / "config.json").write_bytes(content)
    assert_rejected(lambda: load(directory), directory / "config.json", "not valid JSON")


@pytest.mark.parametrize(
    ("content", "said"), [("[1]", "list"), ('"llama"', "str"), ("3", "int"), ("null", "NoneType")]
)
def test_config_that_is_not_an_object(directory, content, said):
    (directory / "config.json").write_text(content)
    assert_rejected(lambda: load(directory), directory / "config.json", "expected a JSON object", said)


def test_missing_config(directory):
    (directory / "config.json").unlink()
    assert_rejected(lambda: load(directory), directory, "has weights but no config.json")


def rope(**fields):
    return {"rope_scaling": fields}


MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
WINDOWED = QWEN2 | {"use_sliding_window": True}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 4.0], "long_factor": [4.0] * 4}
LONG |= {"original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, ["'gpt2'", "supported: llama", "mistral"]),
        ({"model_type": None}, ["model_type None", "supported: llama"]),
        ({"model_type": ["llama"]}, ["model_type", "supported: llama"]),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, ["'gpt2'", "GPT2LMHeadModel"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification"]),
        ({"architectures": ["MistralForCausalLM"]}, ["MistralForCausalLM", "'llama'"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "expected 'silu'"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["quantization_config", "(GPTQ)"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["(FP8)", "an unquantized checkpoint"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["(AWQ)", "or a GGUF file"]),
        ({"quantization_config": {"load_in_4bit": True}}, ["(bitsandbytes)"]),
        ({"compression_config": {"format": "x"}}, ["(compressed-tensors)"]),
        ({"quantization": {"group_size": 64, "bits": 4}}, ["(MLX)"]),
        ({"quantization_config": {"bits": 4}}, ["({'bits': 4})", "or a GGUF file"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5", "'llama'", "all of each head"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads is 3", "divisor of num_attention_heads, 4"]),
        ({"num_key_value_heads": 8}, ["num_key_value_heads is 8", "divisor of num_attention_heads, 4"]),
        ({"head_dim": 7}, ["head_dim is 7", "even"]),
        ({"hidden_size": 36, "num_attention_heads": 4}, ["head_dim is 9", "even"]),
        ({"hidden_size": 33}, ["hidden_size is 33", "multiple of num_attention_heads, 4"]),
        ({"hidden_size": None}, ["hidden_size is missing"]),
        ({"hidden_size": "32"}, ["hidden_size is '32'", "positive integer"]),
        ({"hidden_size": 32.0}, ["hidden_size is 32.0", "positive integer"]),
        ({"hidden_size": -32}, ["hidden_size is -32", "positive integer"]),
        ({"vocab_size": None}, ["vocab_size is missing"]),
        ({"vocab_size": 0}, ["vocab_size is 0", "positive integer"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers is True", "positive integer"]),
        ({"num_attention_heads": 0}, ["num_attention_heads is 0", "positive integer"]),
        ({"intermediate_size": None}, ["intermediate_size is missing"]),
        ({"rms_norm_eps": "1e-5"}, ["rms_norm_eps is '1e-5'", "positive number"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings is 'yes'", "true or false"]),
        ({"attention_bias": 1}, ["attention_bias is 1", "true or false"]),
        ({"eos_token_id": "</s>"}, ["eos_token_id is '</s>'", "token id"]),
        ({"torch_dtype": "int8"}, ["dtype is 'int8'", "float32, float16, bfloat16"]),
        (rope(type="dynamic", factor=2.0), ["rope_type is 'dynamic'", "default, linear, llama3"]),
        (rope(rope_type="yarn", factor=2.0), ["original_max_position_embeddings", "yarn", "positive number"]),
        (rope(**YARN, truncate=0), ["truncate of rope_type 'yarn' is 0", "true or false"]),
        ({"rope_parameters": {"rope_type": "longrope"}}, ["short_factor", "longrope", "a list of 4"]),
        (rope(**LONG | {"short_factor": [1, 2, 3]}), ["short_factor", "has 3 numbers", "a list of 4"]),
        (rope(**LONG | {"long_factor": [1, 2, 3, "4"]}), ["long_factor", "a list of 4 positive numbers"]),
        (rope(type=["linear"], factor=2.0), ["rope_type", "default, linear, llama3"]),
        (rope(type="linear"), ["factor", "linear", "positive number"]),
        (rope(type="linear", factor="2"), ["factor", "'2'", "positive number"]),
        (rope(type="linear", factor=-2), ["factor", "-2", "positive number"]),
        (rope(**LLAMA3), ["original_max_position_embeddings", "llama3", "positive number"]),
        (rope(**LLAMA3 | {"low_freq_factor": 4.0} | ORIGINAL), ["high_freq_factor"]),
        ({"rope_scaling": "linear"}, ["rope_scaling", "'linear'"]),
        ({"rope_parameters": [2.0]}, ["rope_parameters", "[2.0]"]),
        ({"rope_parameters": {"rope_theta": 0}}, ["rope_theta", "positive number"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, ["partial_rotary_factor", "0.25"]),
        ({"rope_theta": -1.0}, ["rope_theta", "-1.0", "positive number"]),
        ({"rope_theta": "10000"}, ["rope_theta", "'10000'", "positive number"]),
        (MISTRAL | {"sliding_window": 0}, ["sliding_window is 0", "positive integer"]),
        (QWEN2 | {"use_sliding_window": 1}, ["use_sliding_window is 1", "true or false"]),
        (QWEN2 | {"layer_types": ["sliding_attention"] * 2}, ["layer_types", "use_sliding_window is true"]),
        (WINDOWED | {"max_window_layers": -1}, ["max_window_layers is -1", "0 or more"]),
        (WINDOWED | {"layer_types": ["full_attention"]}, ["layer_types", "a list of 2"]),
        (WINDOWED | {"layer_types": ["chunked_attention"] * 2}, ["layer_types", "sliding_attention"]),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_config_that_is_rejected(directory, change, words):
    fields = {name: value for name, value in {**CONFIG, **change}.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(fields))
    assert_rejected(lambda: load(directory), directory / "config.json", *words)


@pytest.mark.parametrize("tp", [0, -1, 5])
def test_tp_beyond_the_heads(directory, tp):
    assert_rejected(lambda: load(directory, tp=tp), f"--tp {tp}", "4 attention heads", "from 1 to 4")


def test_unknown_fields_are_listed():
    unknown = {"residual_multiplier": 0.22, "new_norm": "before", "layer_types": ["full_attention"]}
    unknown |= {"use_new_thing": False, "new_number": 0, "new_list": [], "new_object": {}, "use_mrope": True}
    known = {
        "initializer_range": 0.02,
        "transformers_version": "4.40.0",
        "use_cache": False,
        "new_null": None,
    }
    assert parse_config({**CONFIG, **unknown, **known}, "here").unread == tuple(unknown)
    assert parse_config(CONFIG, "here").unread == ()


# The fields that transformers writes for every model if it writes defaults, too (PretrainedConfig of 4.40).
GENERIC = {
    **{"return_dict": True, "output_hidden_states": False, "output_attentions": False, "torchscript": False},
    **{"use_bfloat16": False, "tf_legacy_loss": False, "pruned_heads": {}, "chunk_size_feed_forward": 0},
    **{"is_encoder_decoder": False, "is_decoder": False, "cross_attention_hidden_size": None},
    **{"add_cross_attention": False, "tie_encoder_decoder": False, "max_length": 20, "min_length": 0},
    **{"do_sample": False, "early_stopping": False, "num_beams": 1, "num_beam_groups": 1},
    **{"diversity_penalty": 0.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0},
    **{"repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0},
    **{"encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "num_return_sequences": 1},
    **{"output_scores": False, "return_dict_in_generate": False, "forced_bos_token_id": None},
    **{"forced_eos_token_id": None, "remove_invalid_values": False, "suppress_tokens": None},
    **{"exponential_decay_length_penalty": None, "begin_suppress_tokens": None, "finetuning_task": None},
    **{"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}},
    **{"tokenizer_class": None, "prefix": None, "pad_token_id": None, "sep_token_id": None},
    **{"decoder_start_token_id": None, "task_specific_params": None, "problem_type": None},
    **{"_name_or_path": "", "_attn_implementation_autoset": False, "use_cache": True},
}


def test_generic_fields_with_their_defaults_are_known():
    assert parse_config({**CONFIG, **GENERIC}, "here").unread == ()
    assert parse_config({**CONFIG, **GENERIC, "pruned_heads": {"0": [1]}}, "here").unread == ("pruned_heads",)


def test_old_and_new_spelling_give_the_same_config():
    old = {**CONFIG, "rope_theta": 5e5, "rope_scaling": LLAMA3 | ORIGINAL}
    old["torch_dtype"] = "bfloat16"
    new = {name: value for name, value in old.items() if not name.startswith(("rope", "torch"))}
    new |= {"rope_parameters": {**old["rope_scaling"], "rope_theta": 5e5}, "dtype": "bfloat16"}
    config = parse_config(old, "here")
    assert config == parse_config(new, "here")
    assert (config.rope.rope_theta, config.rope.rope_type, config.rope.factor) == (5e5, "llama3", 8.0)
    assert (config.dtype, config.unread) == ("bfloat16", ())


@pytest.mark.parametrize(
    ("scaling", "factor"),
    [
        (YARN, 0.1 * math.log(4) + 1),
        (YARN | {"factor": 0.5}, 1.0),
        (YARN | {"attention_factor": 1.25, "mscale": 2.0}, 1.25),
        (YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}, (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)),
        (LONG, (1 + math.log(512 / 64) / math.log(64)) ** 0.5),
        (LONG | {"factor": 4.0}, (1 + math.log(4) / math.log(64)) ** 0.5),
        (LONG | {"original_max_position_embeddings": 1024}, 1.0),
        (LONG | {"attention_factor": 0.9}, 0.9),
    ],
)
def test_attention_factor(scaling, factor):
    fields = {**CONFIG, "rope_scaling": scaling}
    config = parse_config(fields, "here")
    assert config.rope.attention_factor == pytest.approx(factor, rel=1e-15)
    assert Oracle(fields, None).rotations[0][1] == pytest.approx(factor, rel=1e-15)


def test_longrope_ends_at_its_original_context():
    """Check that such a model never reaches the contexts that use the long factors."""
    fields = {**CONFIG, "rope_scaling": LONG}
    assert parse_config(fields, "here").max_position_embeddings == 64
    longer = {**fields, "original_max_position_embeddings": 128}  # the top-level field comes first
    assert parse_config(longer, "here").max_position_embeddings == 128
    with pytest.raises(ValueError, match="65 tokens: longrope"):
        Oracle(fields, None).logits([0] * 65)


def test_rope_scaling_overrides_rope_parameters():
    """Check that a file with both is read as in transformers 5, which reads rope_scaling."""
    fields = {**CONFIG, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    config = parse_config(fields, "here")
    assert (config.rope.rope_type, config.rope.factor) == ("linear", 2.0)


def test_absent_fields_are_as_in_transformers():
    needed = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    bare = {name: CONFIG[name] for name in needed} | {"num_attention_heads": 8}
    config = parse_config({**bare, "model_type": "llama"}, "here")
    assert (config.num_key_value_heads, config.head_dim, config.max_position_embeddings) == (8, 4, 2048)
    assert (config.rms_norm_eps, config.rope.rope_theta, config.sliding_window) == (1e-6, 10000.0, None)
    assert (config.tie_word_embeddings, config.qkv_bias, config.mlp_bias) == (False, False, False)
    config = parse_config({**bare, **MISTRAL, "num_attention_heads": 16}, "here")
    assert (config.num_key_value_heads, config.max_position_embeddings) == (8, 131072)
    assert config.sliding_window == 4096
    assert parse_config({**bare, **MISTRAL, "sliding_window": None}, "here").sliding_window is None


def test_layers_of_qwen_with_a_window():
    fields = {**CONFIG, **WINDOWED, "sliding_window": 7}
    assert parse_config({**fields, "use_sliding_window": False}, "here").windows == [None, None]
    assert parse_config(fields, "here").windows == [None, None]  # the first 28 layers have none
    assert parse_config({**fields, "max_window_layers": 0}, "here").windows == [7, 7]
    mixed = parse_config({**fields, "max_window_layers": 1}, "here")
    assert mixed.windows == [None, 7]
    assert mixed.with_layers(1, "here").windows == [None]
    listed = {"layer_types": ["sliding_attention", "full_attention"]}
    assert parse_config({**fields, **listed}, "here").windows == [7, None]
    assert parse_config({**fields, **listed}, "here").unread == ()


def test_generation_config_has_more_end_of_text_tokens(directory):
    assert read_config(directory).eos_token_ids == (CONFIG["eos_token_id"],)
    (directory / "generation_config.json").write_text('{"eos_token_id": [5, 0]}')
    assert read_config(directory).eos_token_ids == (CONFIG["eos_token_id"], 5, 0)
    (directory / "generation_config.json").write_text(f'{{"eos_token_id": {CONFIG["eos_token_id"]}}}')
    assert read_config(directory).eos_token_ids == (CONFIG["eos_token_id"],)
    (directory / "generation_config.json").write_text('{"eos_token_id": null}')
    assert read_config(directory).eos_token_ids == (CONFIG["eos_token_id"],)


@pytest.mark.parametrize("value", ['"</s>"', "[{}]", "[[257]]", "-1"])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_malformed_end_of_text_tokens(directory, file, value):
    (directory / "generation_config.json").write_text("{}")
    fields = json.loads((directory / file).read_text()) | {"eos_token_id": json.loads(value)}
    (directory / file).write_text(json.dumps(fields))
    with pytest.raises(InputError, match=rf"/{file}: eos_token_id "):
        read_config(directory)


# --- random weights -------------------------------------------------------------------------------------

SHAPES = {
    "model.embed_tokens.weight": (500, 96),
    "model.layers.0.self_attn.q_proj.weight": (300, 1000),
    "model.layers.1.self_attn.q_proj.weight": (300, 1000),
    "model.layers.0.mlp.down_proj.weight": (37, 101),  # neither is a multiple of 16, as the generator draws
    "model.layers.0.mlp.up_proj.weight": (5, 3),
    "wide.weight": (3, BLOCK + 21),  # one row is larger than a block
    "tall.weight": (2 * BLOCK // 1600, 1601),  # drawn in several blocks of rows
    "model.norm.weight": (999,),
    "model.layers.0.self_attn.q_proj.bias": (77,),
}


def whole(shape):
    return tuple(slice(0, n) for n in shape)


@pytest.mark.parametrize("name", SHAPES)
def test_slice_of_random_weights(name):
    shape = SHAPES[name]
    random = RandomWeights(SHAPES)
    everything = random.read(name, whole(shape))
    assert everything.shape == shape
    assert everything.dtype == np.float32
    cuts = [[slice(0, n), slice(n // 3, n // 2 + 1), slice(n - 1, n), slice(1, n - 1)] for n in shape]
    if len(shape) == 1:
        indices = [(cut,) for cut in cuts[0]]
    else:  # rows, columns, and both
        indices = [(rows, columns) for rows in cuts[0] for columns in cuts[1]]
    for index in indices:
        np.testing.assert_array_equal(random.read(name, index), everything[index])


def test_random_weights_depend_only_on_seed_and_name():
    name = "model.layers.0.mlp.down_proj.weight"
    everything = whole(SHAPES[name])
    one = RandomWeights(SHAPES).read(name, everything)
    np.testing.assert_array_equal(RandomWeights({name: SHAPES[name]}).read(name, everything), one)
    assert not np.array_equal(RandomWeights(SHAPES, seed=1).read(name, everything), one)


def test_random_weights_of_two_names_are_uncorrelated():
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]
    one, two = [RandomWeights(SHAPES).read(name, whole(SHAPES[name])) for name in names]
    assert abs(np.corrcoef(one.ravel(), two.ravel())[0, 1]) < 0.01  # 5 standard deviations are 0.009
    rows = np.corrcoef(one)  # the rows of one tensor are uncorrelated, too
    assert np.abs(rows - np.eye(len(rows))).max() < 0.2  # 5 standard deviations are 0.16


@pytest.mark.parametrize("name", [name for name in SHAPES if np.prod(SHAPES[name]) > 3000])
def test_mean_and_variance_of_random_weights(name):
    shape = SHAPES[name]
    values = RandomWeights(SHAPES).read(name, whole(shape)).astype(np.float64) * shape[1] ** 0.5
    assert abs(values.mean()) < 5 / values.size**0.5
    assert abs(values.var() - 1) < 5 / values.size**0.5
    assert 0.99 * 3**0.5 < np.abs(values).max() <= 3**0.5  # uniform


def test_random_vectors():
    random = RandomWeights(SHAPES)
    norm = random.read("model.norm.weight", (slice(0, 999),))
    assert 0.89 < norm.min() < 0.91 < 1.09 < norm.max() < 1.11
    bias = random.read("model.layers.0.self_attn.q_proj.bias", (slice(0, 77),))
    assert -0.1 <= bias.min() < -0.05 < 0.05 < bias.max() <= 0.1


def test_random_model_by_name():
    source = open_model("random:smollm2-135m", 4, layers=1)
    assert source.plan.layers == 1
    for name in ("model.layers.0.self_attn.k_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        everything = source.tensors.read(name, whole(source.plan.tensors[name].shape))
        for rank in range(4):
            index = source.plan.tensors[name].index(rank)
            np.testing.assert_array_equal(source.tensors.read(name, index), everything[index])
    assert_rejected(lambda: open_model("random:gpt-5", 4), "random:gpt-5", "mistral-7b", "smollm2-135m")


def test_no_such_directory(tmp_path):
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "nothing"))):
        open_model(str(tmp_path / "nothing"), 2)
