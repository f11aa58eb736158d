"""Tests of the oracle: it shares no code with minitp, and agrees with results computed by hand."""

import ast
import json
import math

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from minitp.oracle import Oracle, families
from minitp.oracle import model as oracle
from minitp.oracle import ops as oracle_ops

ALLOWED_IMPORTS = {
    "ml_dtypes",
    "numpy",
    "safetensors",
    "__future__",
    "collections",
    "json",
    "pathlib",
    "typing",
}
HIDDEN_IMPORTS = {"__import__", "importlib", "exec", "eval", "compile", "sys", "globals", "__builtins__"}

# --- independence ---------------------------------------------------------------------------------------


def forbidden_imports(source, allowed_modules=()):
    """Return the modules that a source must not import, and the names through which it could import one."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] not in ALLOWED_IMPORTS]
        elif isinstance(node, ast.ImportFrom):
            allowed = node.module in allowed_modules or (node.module or "").split(".")[0] in ALLOWED_IMPORTS
            if node.level or not allowed:
                found.append("." * node.level + (node.module or ""))
        elif isinstance(node, ast.Name) and node.id in HIDDEN_IMPORTS:
            found.append(node.id)
        elif isinstance(node, ast.Attribute) and node.attr in HIDDEN_IMPORTS:
            found.append(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "minitp" in node.value:
            found.append(node.value)
    return found


def test_the_oracle_shares_no_code():
    own = "minitp.oracle.families", "minitp.oracle.ops"
    for module, allowed in ((oracle, own), (families, own[1:]), (oracle_ops, ())):
        with open(module.__file__, encoding="utf-8") as file:
            assert forbidden_imports(file.read(), allowed) == []


@pytest.mark.parametrize(
    "source",
    [
        "from minitp import ops",
        "import minitp.ops",
        "from . import ops",
        "from .ops import softmax",
        "def f():\n    import numpy, minitp",
        "import importlib",
        "m = __import__('json')",
        "exec('1')",
        "np.sys.modules",
        "name = 'minitp.ops'",
    ],
)
def test_a_forbidden_import_is_found(source):
    assert forbidden_imports(source)


# --- operations by hand ---------------------------------------------------------------------------------


def test_embed():
    table = np.array([[1, 2], [3, 4], [5, 6]], np.float16)
    rows = oracle_ops.embed([2, 0, 2], table)
    assert rows.dtype == np.float64
    np.testing.assert_array_equal(rows, [[5, 6], [1, 2], [5, 6]])


@pytest.mark.parametrize("token", [-1, 3])
def test_embed_rejects_tokens_outside_the_vocabulary(token):
    with pytest.raises(ValueError, match="vocabulary"):
        oracle_ops.embed([token], np.zeros((3, 2)))


def test_rms_norm_of_three_and_four():
    # The mean square is 25 / 2, and its root is 5 / sqrt(2).
    y = oracle_ops.rms_norm([[3, 4]], [1, 10], eps=0)
    np.testing.assert_allclose(y, [[3 * math.sqrt(2) / 5, 40 * math.sqrt(2) / 5]], rtol=1e-15)


def test_rms_norm_adds_eps_to_the_mean():
    np.testing.assert_allclose(oracle_ops.rms_norm([[1, 1]], [1, 1], eps=3), [[0.5, 0.5]], rtol=1e-15)


def test_linear_takes_weights_as_out_by_in():
    w = [[1, 0], [0, 1], [10, 100]]
    np.testing.assert_array_equal(oracle_ops.linear([[1, 2]], w), [[1, 2, 210]])
    np.testing.assert_array_equal(oracle_ops.linear([[1, 2]], w, [0, 0, 5]), [[1, 2, 215]])


def test_rope_by_ninety_degrees_turns_the_first_half_into_the_second():
    x = np.array([[[1.0, 2.0, 3.0, 4.0]] * 3])  # [1, T, d]: the pairs are (1, 3) and (2, 4)
    turned = oracle_ops.rope(x, [0, 1, 2], np.array([np.pi / 2, 0]))
    np.testing.assert_allclose(turned, [[[1, 2, 3, 4], [-3, 2, 1, 4], [-1, 2, -3, 4]]], atol=1e-15)


def test_rope_of_a_part_of_each_head():
    x = np.array([[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]] * 2])  # [1, T, d]: the pairs are (1, 3) and (2, 4)
    turned = oracle_ops.rope(x, [0, 1], np.array([np.pi / 2, 0]), factor=2)
    np.testing.assert_allclose(turned, [[[2, 4, 6, 8, 5, 6], [-6, 4, 2, 8, 5, 6]]], atol=1e-15)
    for fields in ({"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}):
        found = oracle_ops.rope_inverse_frequencies(rope_config(**fields) | {"head_dim": 8})
        np.testing.assert_allclose(found, [1, 0.01], rtol=1e-15)


def rope_config(**rope):
    return {"head_dim": 4, "hidden_size": 99, "num_attention_heads": 7, **rope}


def test_rope_frequencies_by_default():
    np.testing.assert_allclose(oracle_ops.rope_inverse_frequencies(rope_config()), [1, 0.01], rtol=1e-15)
    new = rope_config(rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    np.testing.assert_allclose(oracle_ops.rope_inverse_frequencies(new), [1, 1e-3], rtol=1e-15)
    without_head_dim = {"hidden_size": 8, "num_attention_heads": 2, "rope_theta": 100.0}
    np.testing.assert_allclose(oracle_ops.rope_inverse_frequencies(without_head_dim), [1, 0.1], rtol=1e-15)


def test_rope_frequencies_linear():
    scaling = {"type": "linear", "factor": 4.0}
    found = oracle_ops.rope_inverse_frequencies(rope_config(rope_theta=1e4, rope_scaling=scaling))
    np.testing.assert_allclose(found, [0.25, 0.0025], rtol=1e-15)


def test_rope_scaling_takes_precedence_over_rope_parameters():
    """The older spelling counts, as in transformers."""
    older, newer = {"type": "linear", "factor": 2.0}, {"rope_type": "default"}
    found = oracle_ops.rope_inverse_frequencies(rope_config(rope_scaling=older, rope_parameters=newer))
    np.testing.assert_allclose(found, [0.5, 0.005], rtol=1e-15)


def llama3(length, theta=1e4):
    fields = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    fields["original_max_position_embeddings"] = length
    return rope_config(rope_parameters={"rope_type": "llama3", "rope_theta": theta, **fields})


def test_rope_frequencies_llama3_endpoints():
    # The wavelengths are 2 pi and 200 pi. In a context of 100 the first pair makes 16 rotations and keeps its
    # frequency; the second makes less than one, and its frequency is divided by 8.
    np.testing.assert_allclose(oracle_ops.rope_inverse_frequencies(llama3(100)), [1, 0.01 / 8], rtol=1e-15)
    # A pair with 4 rotations keeps its frequency; with 1 it is divided by 8; in the middle it is their mean.
    for rotations, expected in ((4, 1), (1, 1 / 8), (2.5, (1 + 1 / 8) / 2)):
        found = oracle_ops.rope_inverse_frequencies(llama3(2 * np.pi * rotations))[0]
        np.testing.assert_allclose(found, expected, rtol=1e-14)


@pytest.mark.parametrize("spelling", [{"rope_type": "ntk"}, {"type": "dynamic"}])
def test_an_unknown_rope_type_is_rejected(spelling):
    with pytest.raises(ValueError, match=r"rope_type '(ntk|dynamic)'"):
        oracle_ops.rope_inverse_frequencies(rope_config(rope_scaling={**spelling, "factor": 2.0}))


def test_causal_mask():
    everything = oracle_ops.causal_mask([0, 1, 2], [0, 1, 2])
    np.testing.assert_array_equal(everything, [[1, 0, 0], [1, 1, 0], [1, 1, 1]])
    np.testing.assert_array_equal(oracle_ops.causal_mask([5], [3, 4, 5, 6], window=2), [[0, 1, 1, 0]])


def test_scores_and_softmax():
    q, k = np.array([[[2.0, 0, 0, 0]]]), np.array([[[math.log(3), 0, 0, 0], [0, 9, 9, 9], [5, 5, 5, 5]]])
    masked = oracle_ops.scores(q, k, np.array([[True, True, False]]))
    np.testing.assert_allclose(masked, [[[math.log(3), 0, -np.inf]]])  # 2 ln 3 / sqrt(4)
    np.testing.assert_allclose(oracle_ops.softmax(masked), [[[0.75, 0.25, 0]]])
    np.testing.assert_allclose(oracle_ops.softmax([1e6, 1e6]), [0.5, 0.5])


def test_adjacent_query_heads_share_a_kv_head():
    q, kv = np.array([1.0, 2, 3, 4]).reshape(4, 1, 1), np.array([10.0, 100]).reshape(2, 1, 1)
    np.testing.assert_array_equal(oracle_ops.scores(q, kv, np.array([[True]])).ravel(), [10, 20, 300, 400])
    np.testing.assert_array_equal(oracle_ops.context(q, kv), [[10, 20, 300, 400]])


def test_attention_of_a_single_token_is_its_value():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((4, 1, 2)), rng.standard_normal((2, 1, 2)), rng.standard_normal((2, 1, 2))
    context = oracle_ops.attention(q, k, v, np.array([[True]]))
    np.testing.assert_allclose(context, [np.concatenate((v[0, 0], v[0, 0], v[1, 0], v[1, 0]))], rtol=1e-15)


def test_swiglu():
    gate = [[0, math.log(3), -1e4, 1e4]]  # sigma(ln 3) = 3 / 4
    act = oracle_ops.swiglu(gate, [[7, 4, 2, 2]])
    np.testing.assert_allclose(act, [[0, 3 * math.log(3), 0, 2e4]], rtol=1e-15)


# --- the model ------------------------------------------------------------------------------------------

TINY = {"vocab_size": 11, "hidden_size": 6, "intermediate_size": 5, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2, "max_position_embeddings": 64}
LLAMA, MISTRAL = {"model_type": "llama", **TINY}, {"model_type": "mistral", **TINY}
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


def tiny_tensors(dtype=np.float32, kv_heads=2, layers=2):
    """Return all tensors that a model with the sizes of TINY may need."""
    rng = np.random.default_rng(7)
    shapes = {"model.embed_tokens.weight": (11, 6), "lm_head.weight": (11, 6), "model.norm.weight": (6,)}
    outputs = {"self_attn.q_proj": (8, 6), "self_attn.o_proj": (6, 8), "mlp.down_proj": (6, 5)}
    outputs |= {f"self_attn.{part}_proj": (2 * kv_heads, 6) for part in "kv"}
    outputs |= {f"mlp.{part}_proj": (5, 6) for part in ("gate", "up")}
    for i in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{norm}.weight"] = (6,)
        for name, shape in outputs.items():
            shapes |= {f"model.layers.{i}.{name}.weight": shape, f"model.layers.{i}.{name}.bias": shape[:1]}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def logits(config, tensors=None, **kwargs):
    return Oracle(config, (tensors or tiny_tensors()).__getitem__, **kwargs).logits(TOKENS)


def test_names_order_and_shapes_of_steps():
    steps = list(Oracle(LLAMA, tiny_tensors().__getitem__).steps(TOKENS))
    attention = {"norm": (8, 6), "q": (4, 8, 2), "k": (2, 8, 2), "v": (2, 8, 2), "q_rope": (4, 8, 2)}
    attention |= {"k_rope": (2, 8, 2), "scores": (4, 8, 8), "probs": (4, 8, 8), "context": (8, 8)}
    attention |= {"out": (8, 6), "residual": (8, 6)}
    mlp = {"norm": (8, 6), "gate": (8, 5), "up": (8, 5), "act": (8, 5), "out": (8, 6), "residual": (8, 6)}
    expected = [("tokens", (8,)), ("positions", (8,)), ("embed", (8, 6))]
    for i in range(2):
        expected += [(f"layers.{i}.attn.{name}", shape) for name, shape in attention.items()]
        expected += [(f"layers.{i}.mlp.{name}", shape) for name, shape in mlp.items()]
    expected += [("final_norm", (8, 6)), ("logits", (8, 11))]
    assert [(name, array.shape) for name, array in steps] == expected
    dtypes = {name: array.dtype for name, array in steps}
    assert (dtypes.pop("tokens"), dtypes.pop("positions")) == (np.int64, np.int64)
    assert set(dtypes.values()) == {np.dtype(np.float64)}


def test_a_later_token_does_not_change_earlier_logits():
    model = Oracle(LLAMA, tiny_tensors().__getitem__)
    np.testing.assert_allclose(model.logits(TOKENS)[:5], model.logits(TOKENS[:5]), rtol=1e-12)


def test_attention_does_not_reach_beyond_the_window():
    """The model has one layer: in a second one, the tokens in the window would carry earlier information."""
    one_layer = Oracle({**MISTRAL, "sliding_window": 3}, tiny_tensors().__getitem__, layers=1)
    changed = [9, 9, 9, 9, 9, *TOKENS[5:]]
    # With the same last three tokens the last logits are equal, whatever the earlier tokens are.
    np.testing.assert_allclose(one_layer.logits(changed)[-1], one_layer.logits(TOKENS)[-1], rtol=1e-12)
    assert np.abs(one_layer.logits(changed)[-2] - one_layer.logits(TOKENS)[-2]).max() > 1e-3


def test_defaults_of_absent_fields():
    for config, defaults in (
        (LLAMA, {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}),
        (LLAMA, {"sliding_window": 2}),  # a field that Llama does not have
        (MISTRAL, {"attention_bias": True, "mlp_bias": True}),  # fields that Mistral does not have
    ):
        np.testing.assert_array_equal(logits(config), logits({**config, **defaults}))
    without = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
    tensors = tiny_tensors(kv_heads=4)
    explicit = {**LLAMA, "num_key_value_heads": 4}
    np.testing.assert_array_equal(logits(without, tensors), logits(explicit, tensors))
    mistral = {**MISTRAL, "num_attention_heads": 16}
    del mistral["num_key_value_heads"]
    assert Oracle(mistral, None).kv_heads == 8
    assert Oracle(mistral, None).windows == [4096, 4096]
    assert Oracle({**mistral, "sliding_window": None}, None).windows == [None, None]
    qwen = {**LLAMA, "model_type": "qwen2"}
    assert Oracle({**qwen, "max_window_layers": 0}, None).windows == [None, None]
    # By default the first 28 layers have no window.
    assert Oracle({**qwen, "use_sliding_window": True}, None).windows == [None, None]
    assert Oracle({**qwen, "use_sliding_window": True, "max_window_layers": 1}, None).windows == [None, 4096]
    assert Oracle({**MISTRAL, "num_key_value_heads": None}, None).kv_heads == 4
    assert Oracle({**LLAMA, "head_dim": None, "hidden_size": 8}, None).rotations[0][0].shape == (1,)


@pytest.mark.parametrize(
    "field",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"tie_word_embeddings": True},
        {"rope_theta": 5.0, "head_dim": 2, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rms_norm_eps": 0.1},
    ],
    ids=lambda field: next(iter(field)),
)
def test_fields_change_the_logits(field):
    assert np.abs(logits(LLAMA) - logits({**LLAMA, **field})).max() > 1e-3


@pytest.mark.parametrize("flag", ["attention_bias", "mlp_bias"])
def test_biases_are_added_to_their_projections(flag):
    tensors = tiny_tensors()
    steps = dict(Oracle({**LLAMA, flag: True}, tensors.__getitem__).steps(TOKENS))
    for part in "qkv":  # [n, T, d] -> [T, n * d]
        steps[f"layers.1.attn.{part}"] = np.hstack(steps[f"layers.1.attn.{part}"])
    for step, source, name in (
        ("attn.q", "attn.norm", "self_attn.q_proj"),
        ("attn.k", "attn.norm", "self_attn.k_proj"),
        ("attn.v", "attn.norm", "self_attn.v_proj"),
        ("attn.out", "attn.context", "self_attn.o_proj"),
        ("mlp.gate", "mlp.norm", "mlp.gate_proj"),
        ("mlp.up", "mlp.norm", "mlp.up_proj"),
        ("mlp.out", "mlp.act", "mlp.down_proj"),
    ):
        w, b = (oracle_ops.float64(tensors[f"model.layers.1.{name}.{kind}"]) for kind in ("weight", "bias"))
        with_bias = name.startswith("self_attn" if flag == "attention_bias" else "mlp")
        expected = steps[f"layers.1.{source}"] @ w.T + (b if with_bias else 0)
        np.testing.assert_allclose(steps[f"layers.1.{step}"], expected, rtol=1e-11)


def test_first_layers_only():
    assert len(list(Oracle(LLAMA, tiny_tensors().__getitem__, layers=1).steps(TOKENS))) == 3 + 17 + 2
    first_layer = logits(LLAMA, tiny_tensors(layers=1), layers=1)
    np.testing.assert_array_equal(first_layer, logits({**LLAMA, "num_hidden_layers": 1}))
    for layers in (0, 3):
        with pytest.raises(ValueError, match="the model has 2"):
            Oracle(LLAMA, None, layers=layers)


@pytest.mark.parametrize("field", [{"model_type": "gpt2"}, {"model_type": None}, {"hidden_act": "gelu"}])
def test_an_unknown_model_is_rejected(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        Oracle({**LLAMA, **field}, None)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_reading_a_directory(tmp_path, dtype):
    tensors = tiny_tensors(dtype)
    expected = logits(MISTRAL, tensors)
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL), encoding="utf-8")
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    np.testing.assert_array_equal(Oracle.from_directory(tmp_path).logits(TOKENS), expected)
    save_file(tensors, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(Oracle.from_directory(str(tmp_path)).logits(TOKENS), expected)
    first_layer = Oracle.from_directory(tmp_path, layers=1).logits(TOKENS)
    np.testing.assert_array_equal(first_layer, logits(MISTRAL, tensors, layers=1))


def test_logits_computed_in_blocks_of_the_vocabulary(monkeypatch):
    expected = logits(LLAMA)
    monkeypatch.setattr(oracle, "VOCABULARY_BLOCK", 4)
    np.testing.assert_allclose(logits(LLAMA), expected, rtol=1e-12)
