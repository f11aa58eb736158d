"""Tests of family-specific behavior that the golden files in tests/goldens do not cover."""

import inspect
import json
import math
import re
import shutil
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from paths import DOCS, GOLDENS
from published_configs import PARAMETERS, PUBLISHED, SIZES
from safetensors.numpy import load_file, save_file
from tiny import CONFIG

from minitp import moe, ops
from minitp.bench.rounds import keys_read
from minitp.cli.main import main
from minitp.comm import run_threads
from minitp.cuda.fused import SUPPORTED, unfit
from minitp.device import open_device
from minitp.errors import InputError
from minitp.estimate.work import Pass, rank_work
from minitp.generate import largest_pass
from minitp.load import load_model
from minitp.loading.config import parse_config
from minitp.loading.export import write_shards
from minitp.loading.source import open_model, warn_of_unread_fields
from minitp.oracle import Oracle
from minitp.oracle import ops as oracle_ops
from minitp.rope import rope_inverse_frequencies
from minitp.shard import make_plan

QKV = "model.layers.1.self_attn.qkv_proj.weight"
GEMMA2 = {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}
GEMMA3 = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
GRANITE = {"model_type": "granite", "architectures": ["GraniteForCausalLM"]}
MIXTRAL = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
QWEN3_MOE = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
PHI3 = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}


def copied(name, directory, change):
    """Copy a golden's model to `directory`, with change(tensors) applied; return the directory."""
    shutil.copytree(GOLDENS / name, directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return str(directory)


# --- config.json as it is published ---------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_completely(name):
    config = parse_config({**SIZES, **PUBLISHED[name]}, name)
    assert config.unread == ()
    Oracle({**SIZES, **PUBLISHED[name]}, None)  # the oracle has its own reader


@pytest.mark.parametrize("path", sorted(GOLDENS.glob("*/config.json")), ids=lambda path: path.parent.name)
def test_configs_written_by_transformers_are_read_completely(path):
    assert parse_config(json.loads(path.read_text()), str(path)).unread == ()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count_of_the_plan(name):
    """Compare with the published sizes of the models."""
    plan = make_plan(parse_config({**SIZES, **PUBLISHED[name]}, name), 1)
    found = sum(np.prod(shard.shape) for shard in plan.tensors.values())
    assert found == pytest.approx(PARAMETERS[name], rel=2e-3)


# --- the fused path -------------------------------------------------------------------------------------

# What the fused path refuses: fields of config.json, the dtype and --kv-dtype, and the reason.
REFUSED = [
    ({}, np.float32, "auto", "its kernels compute in 16 bits, not in float32"),
    ({}, np.float16, "int8", "its kernels read a cache of float16, not of int8"),
    ({"head_dim": 320}, np.float16, "auto", "its kernels support a head_dim of up to 256, not 320"),
    (
        MIXTRAL | {"num_local_experts": 5000},
        np.float16,
        "auto",
        "its kernels choose among at most 4096 experts, not 5000",
    ),
]


def test_the_documentation_lists_all_that_the_fused_path_refuses():
    """Compare the list in docs/gpus.md with the reasons of `unfit`, of which there must be no others."""
    listed = re.findall(r"^\| [^|]+ \| (its? [^|]+) \|$", (DOCS / "gpus.md").read_text(), re.MULTILINE)
    assert listed == [reason for *_, reason in REFUSED]
    for fields, dtype, kv_dtype, reason in REFUSED:
        config = parse_config({**CONFIG, **fields}, "here")
        assert unfit(config, make_plan(config, 1), SimpleNamespace(dtype=np.dtype(dtype)), kv_dtype) == reason
    assert inspect.getsource(unfit).count('return f"') == len(REFUSED) + 1  # the last is for new options


def test_the_fused_path_refuses_an_option_without_kernels(monkeypatch):
    monkeypatch.setattr("minitp.cuda.fused.SUPPORTED", SUPPORTED - {"residual_multiplier"})
    config = parse_config({**CONFIG, **GRANITE, "residual_multiplier": 0.22}, "here")
    device = SimpleNamespace(dtype=np.dtype(np.float16))
    assert (
        unfit(config, make_plan(config, 1), device, "auto") == "it has no kernels for a residual_multiplier"
    )


# --- Granite --------------------------------------------------------------------------------------------


def test_defaults_and_errors_of_granite():
    config = parse_config({**CONFIG, **GRANITE}, "here")
    assert (config.embedding_multiplier, config.attention_multiplier) == (1, 1)
    assert (config.residual_multiplier, config.logits_scaling) == (1, 1)
    for fields, words in (
        ({"residual_multiplier": -0.22}, r"residual_multiplier is -0\.22, expected a positive number"),
        ({"logits_scaling": 0}, "logits_scaling is 0, expected a positive number"),
        ({"attention_multiplier": None}, "attention_multiplier is missing"),
    ):
        with pytest.raises(InputError, match=words):
            parse_config({**CONFIG, **GRANITE, **fields}, "here")


def test_llama_ignores_multipliers():
    """Check that multipliers are listed as unknown, and that neither the model nor the oracle uses them."""
    fields = {**CONFIG, "embedding_multiplier": 12.0, "attention_multiplier": 1, "logits_scaling": 8.0}
    config, reference = parse_config({**fields, "residual_multiplier": 0.22}, "here"), Oracle(fields, None)
    assert sorted(config.unread) == sorted({"residual_multiplier", *fields} - {*CONFIG})
    assert config.attention_multiplier is None
    assert reference.score_root**2 == pytest.approx(CONFIG["hidden_size"] / CONFIG["num_attention_heads"])
    assert config.embedding_multiplier == reference.embedding_scale == 1
    assert config.residual_multiplier == reference.residual_scale == 1
    assert config.logits_scaling == reference.logits_divisor == 1


def test_scaled_rounds_once():
    """Check that the factor is not rounded: in bfloat16, 0.22 is off by 1 in 800."""
    x = np.arange(1, 100).astype(ml_dtypes.bfloat16)
    expected = (np.float64(x) * 0.22).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(ops.scaled(np, x, 0.22), expected)
    assert (expected != x * ml_dtypes.bfloat16(0.22)).any()
    assert ops.scaled(np, x, 1.0) is x


# --- Gemma ----------------------------------------------------------------------------------------------


def test_alternate_layers_of_gemma_have_a_window():
    fields = {**CONFIG, **GEMMA2, "num_hidden_layers": 3, "sliding_window": 7}
    assert parse_config(fields, "here").windows == [7, None, 7]
    assert Oracle(fields, None).windows == [7, None, 7]
    listed = {**fields, "layer_types": ["full_attention", "full_attention", "sliding_attention"]}
    assert parse_config(listed, "here").windows == Oracle(listed, None).windows == [None, None, 7]


def test_layers_without_a_window_limit_the_largest_pass(monkeypatch):
    config = parse_config({**CONFIG, **GEMMA2, "sliding_window": 7, "max_position_embeddings": 8192}, "here")
    model_ = SimpleNamespace(config=config, plan=make_plan(config, 1), fused=False, prefill_chunk=512)
    monkeypatch.setattr("minitp.generate.MAX_SCORES", 4 * 4 * 10_000)
    assert largest_pass(model_, past=9488) == 4  # four heads, 9488 + 512 keys
    assert keys_read(model_, stop=100, tokens=1) == (7 + 100) // 2


def test_defaults_and_errors_of_gemma():
    config = parse_config({**CONFIG, **GEMMA2}, "here")
    assert config.hidden_act == "gelu_pytorch_tanh"
    assert (config.tie_word_embeddings, config.head_dim) == (True, 256)
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)
    uncapped = parse_config({**CONFIG, **GEMMA2, "attn_logit_softcapping": None}, "here")
    assert uncapped.attn_logit_softcapping is None
    for fields, words in (
        ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu', expected 'gelu_pytorch_tanh'"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"attn_logit_softcapping": 0}, "attn_logit_softcapping is 0, expected a positive number"),
    ):
        with pytest.raises(InputError, match=words):
            parse_config({**CONFIG, **GEMMA2, **fields}, "here")


def test_embedding_multiplier_of_gemma_is_rounded_to_the_dtype():
    source, device = open_model(str(GOLDENS / "gemma2"), 1), open_device("bfloat16")
    (found,) = run_threads(1, lambda comm: load_model(source, comm, device).embedding_multiplier)
    assert found == float(ml_dtypes.bfloat16(math.sqrt(42))) != math.sqrt(42)


def test_gemma3_has_a_rope_for_the_layers_with_a_window():
    published = {
        **SIZES,
        **PUBLISHED["gemma-3-1b-it"],
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    config, reference = parse_config(published, "here"), Oracle(published, None)
    full = {5, 11, 17, 23}
    assert config.windows == reference.windows == [None if i in full else 512 for i in range(26)]
    found = [(rope.rope_theta, rope.rope_type, rope.factor) for rope in config.ropes]
    assert found == [(1e6, "linear", 8.0) if i in full else (1e4, "default", 1.0) for i in range(26)]
    for i, (frequencies, factor) in enumerate(reference.rotations):
        expected = rope_inverse_frequencies(config.ropes[i], 256), config.ropes[i].attention_factor
        np.testing.assert_allclose(frequencies, expected[0], rtol=1e-13)
        assert factor == expected[1]
    kinds = {"full_attention": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}}
    newer = {name: value for name, value in published.items() if not name.startswith("rope_")}
    newer |= {"rope_parameters": {**kinds, "sliding_attention": {"rope_theta": 50.0}}}
    config, reference = parse_config(newer, "here"), Oracle(newer, None)
    assert (config.rope.rope_type, config.rope.rope_theta, config.local_rope.rope_theta) == ("yarn", 1e6, 50)
    assert [factor for _, factor in reference.rotations] == [rope.attention_factor for rope in config.ropes]


def test_defaults_and_errors_of_gemma3():
    config = parse_config({**CONFIG, **GEMMA3, "num_hidden_layers": 7}, "here")
    assert config.full_attention_layers == {5}
    assert (config.final_logit_softcapping, config.attention_multiplier) == (None, None)
    capped = parse_config({**CONFIG, **GEMMA3, "attn_logit_softcapping": 50.0}, "here")
    assert capped.unread == ("attn_logit_softcapping",)  # transformers does not use it, either
    longrope = {"rope_type": "longrope", "short_factor": [1.0] * 128, "long_factor": [1.0] * 128}
    longrope |= {"original_max_position_embeddings": 64}
    for fields, words in (
        (
            {"sliding_window": None},
            "sliding_window is None, expected a positive integer, because some layers",
        ),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern is 0, expected a positive integer"),
        ({"rope_local_base_freq": -1}, "rope_local_base_freq is -1, expected a positive number"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 8.0}},
            "expected the objects full_attention and",
        ),
        ({"rope_parameters": {"full_attention": 3}}, "full_attention is 3, expected an object"),
        (
            {"rope_parameters": {"sliding_attention": longrope}},
            "sliding_attention is 'longrope', expected an",
        ),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ):
        with pytest.raises(InputError, match=words):
            parse_config({**CONFIG, **GEMMA3, **fields}, "here")
    full = {"sliding_window": None, "layer_types": ["full_attention"] * 2}
    assert parse_config({**CONFIG, **GEMMA3, **full}, "here").windows == [None, None]


def test_models_of_images_and_text_are_refused():
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34}
    fields = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
    }
    words = (
        r"'gemma3' is not for text alone \(it has a text_config\); supported are models for text alone: llama"
    )
    with pytest.raises(InputError, match=words) as error:
        parse_config(fields, "here")
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_soft_cap(cap):
    x = np.array([-1e4, -3.0, -1e-3, 0.0, 0.2, 5.0, 1e4])
    np.testing.assert_allclose(oracle_ops.soft_cap(x, cap), cap * np.tanh(x / cap), rtol=0, atol=1e-14 * cap)
    # tanh is accurate to an ulp or two, its argument to half an ulp, and near 0 the error does not grow.
    np.testing.assert_allclose(ops.soft_cap(np, np.float32(x), cap), oracle_ops.soft_cap(x, cap), rtol=4e-7)


def test_geglu():
    """Compare with the erf form, which the tanh form approximates to within 5e-4."""
    x = np.linspace(-6, 6, 49)
    exact = [v / 2 * (1 + math.erf(v / math.sqrt(2))) for v in x]
    np.testing.assert_allclose(oracle_ops.geglu(x, np.ones(49)), exact, rtol=0, atol=5e-4)
    gate_up = np.float32(np.stack((x, np.full(49, 2.0)), axis=1))  # [T, 2]
    expected = oracle_ops.geglu(gate_up[:, :1], gate_up[:, 1:])
    # 1 + tanh has the rounding error of 1, which is then multiplied by x / 2 and by 2.
    np.testing.assert_allclose(ops.geglu(np, gate_up), expected, rtol=4e-7, atol=6 * 2**-23)


# --- warnings at start ----------------------------------------------------------------------------------


def test_longrope_warns_of_its_context(capsys):
    warn_of_unread_fields(open_model(str(GOLDENS / "phi3-longrope"), 1))
    assert "'longrope' is supported only up to its original context of 64 tokens" in capsys.readouterr().err
    warn_of_unread_fields(open_model(str(GOLDENS / "phi3"), 1))
    assert capsys.readouterr().err == ""


def test_plan_counts_the_layers_with_a_window(capsys):
    assert main(["plan", "--model", str(GOLDENS / "gemma2"), "--gpu", "h100", "--tp", "2"]) == 0
    assert "reads the last 7 in 2 of 3 layers." in " ".join(capsys.readouterr().out.split())


# --- experts --------------------------------------------------------------------------------------------


def test_more_experts_per_token_than_experts():
    with pytest.raises(InputError, match="num_experts_per_tok is 3, expected at most num_local_experts, 2"):
        parse_config({**CONFIG, **MIXTRAL, "num_local_experts": 2, "num_experts_per_tok": 3}, "here")


def test_defaults_and_errors_of_qwen3_moe():
    config = parse_config({**CONFIG, **QWEN3_MOE}, "here")
    assert (config.num_local_experts, config.num_experts_per_tok, config.intermediate_size) == (128, 8, 768)
    assert (config.norm_topk_prob, config.head_dim) == (False, 8)
    both = parse_config({**CONFIG, **QWEN3_MOE, "num_experts": 16, "num_local_experts": 32}, "here")
    assert (both.num_local_experts, both.unread) == (32, ())  # as in transformers
    window = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    assert parse_config({**CONFIG, **QWEN3_MOE, **window}, "here").windows == [5, 5]  # in all layers
    listed = parse_config({**CONFIG, **QWEN3_MOE, **window, "layer_types": ["full_attention"] * 2}, "here")
    assert listed.unread == ("layer_types",)  # transformers does not read it in this family
    for fields, words in (
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2, expected 1, the only supported value"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\], expected \[\], the only supported value"),
        ({"num_experts": 0}, "num_experts is 0, expected a positive integer"),
        ({"num_experts": 4}, "num_experts_per_tok is 8, expected at most num_experts, 4"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1, expected true or false"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
    ):
        with pytest.raises(InputError, match=words):
            parse_config({**CONFIG, **QWEN3_MOE, **fields}, "here")
    for fields in ({"decoder_sparse_step": 2}, {"mlp_only_layers": [0]}):
        with pytest.raises(ValueError, match="layers without experts"):
            Oracle({**CONFIG, **QWEN3_MOE, **fields}, None)


@pytest.mark.parametrize("normalized", [True, False])
def test_weights_of_the_chosen_experts(normalized):
    logits = np.log(np.float32([[1, 4, 2, 3]]))  # the softmax over all is 0.1, 0.4, 0.2, 0.3
    expected = [4 / 7, 3 / 7] if normalized else [0.4, 0.3]
    chosen, weights = moe.route(np, logits, 2, normalized)
    assert chosen.tolist() == [[1, 3]]
    np.testing.assert_allclose(weights, [expected], rtol=1e-6)
    np.testing.assert_allclose(oracle_ops.route(logits, 2, normalized)[0, [1, 3]], expected, rtol=1e-6)


def test_the_active_parameters_of_a_published_mixture():
    """Compare with the published 3.3 billion, which include the embeddings."""
    config = parse_config({**SIZES, **PUBLISHED["Qwen3-30B-A3B"]}, "here")
    (nbytes, _), _ = rank_work(config, make_plan(config, 1), 0, Pass(1, 1, 0), "bfloat16")
    assert nbytes / 2 + config.vocab_size * config.hidden_size == pytest.approx(3.35e9, rel=1e-2)


def test_routing_breaks_ties_by_index():
    chosen, weights = moe.route(np, np.zeros((2, 5), np.float32), 2)
    assert chosen.tolist() == [[0, 1], [0, 1]]
    np.testing.assert_array_equal(weights, 0.5)
    assert oracle_ops.route(np.zeros((1, 5)), 2).tolist() == [[0.5, 0.5, 0, 0, 0]]


def test_routing_ranks_experts_whose_probability_underflows():
    """Check that the choice goes by logits: e^-200 is 0 in float32."""
    chosen, weights = moe.route(np, np.array([[-200, -400, 0, -300]], np.float32), 2)
    assert (chosen.tolist(), weights.tolist()) == ([[0, 2]], [[0.0, 1.0]])


def test_routing_of_logits_that_are_not_finite():
    """Check that a float16 run that overflows gets NaN, and not an exception that hides the overflow."""
    inf, nan = np.inf, np.nan
    rows = [[nan, nan, nan, nan], [-inf, inf, -inf, -inf], [0, nan, 1, -inf], [0, -inf, inf, inf]]
    with np.errstate(invalid="ignore"):
        chosen, weights = moe.route(np, np.array(rows, np.float32), 2)
    assert chosen.tolist() == [[0, 1], [0, 1], [1, 2], [2, 3]]
    assert np.isnan(weights).any(axis=1).all()


def test_one_token_reads_its_experts_and_many_tokens_read_all():
    config = parse_config({**CONFIG, **MIXTRAL, "num_local_experts": 8}, "here")
    plan, layers, expert = make_plan(config, 1), CONFIG["num_hidden_layers"], 3 * 32 * 48

    def read(tokens):
        return rank_work(config, plan, 0, Pass(tokens, 1, 0), "float32")[0]

    everything = 4 * (sum(np.prod(shard.shape) for shard in plan.tensors.values()) - 258 * 32)
    assert read(1)[0] == everything - 4 * layers * 6 * expert
    assert read(4)[0] == everything - 4 * layers * 8 * 0.75**4 * expert  # some experts are not chosen by any
    assert read(10**6)[0] == everything
    assert read(1)[1] == 2 * (read(1)[0] / 4 - (2 * layers + 1) * 32)  # 2 operations per weight


# --- joined tensors -------------------------------------------------------------------------------------


def test_missing_joined_tensor(tmp_path):
    directory = copied("phi3-longrope", tmp_path / "model", lambda tensors: tensors.pop(QKV))
    with pytest.raises(InputError, match=rf"{QKV} is missing, expected shape \[96, 48\]"):
        open_model(directory, 2)


def test_misshapen_joined_tensor(tmp_path):
    def without_v(tensors):
        tensors[QKV] = tensors[QKV][:72].copy()

    directory = copied("phi3-longrope", tmp_path / "model", without_v)
    with pytest.raises(InputError, match=rf"{QKV} has shape \[72, 48\], expected \[96, 48\]"):
        open_model(directory, 2)


def test_separate_tensors_do_not_replace_a_joined_tensor(tmp_path):
    def separate(tensors):
        q, k, v = np.split(tensors.pop(QKV), [48, 72])
        for part, rows in zip("qkv", (q, k, v), strict=True):
            tensors[QKV.replace("qkv", part)] = rows.copy()

    directory = copied("phi3-longrope", tmp_path / "model", separate)
    with pytest.raises(InputError, match=f"{QKV} is missing"):
        open_model(directory, 2)


@pytest.mark.parametrize("tp", [1, 4, 6])
def test_shards_of_joined_tensors_rebuild_the_file(tp, tmp_path):
    """Rebuild the file from plan.json, which has each part's ranges and its place in the joined tensor."""
    write_shards(tmp_path, open_model(str(GOLDENS / "phi3-longrope"), tp))
    plan = json.loads((tmp_path / "plan.json").read_text())
    ranks = [load_file(tmp_path / f"rank{r}.safetensors") for r in range(tp)]
    file = load_file(GOLDENS / "phi3-longrope" / "model.safetensors")
    rebuilt = {name: np.zeros_like(array) for name, array in file.items()}
    for name, entry in plan["tensors"].items():
        first = entry.get("first_row", 0)
        whole = rebuilt[entry.get("part_of", name)][first : first + entry["shape"][0]]
        for tensors, (start, stop) in zip(ranks, entry["ranges"] or [(0, None)] * tp, strict=True):
            whole[(slice(None),) * (entry["axis"] or 0) + (slice(start, stop),)] = tensors[name]
    for name, array in file.items():
        np.testing.assert_array_equal(rebuilt[name], array, err_msg=name)


def test_layers_option_with_joined_tensors():
    assert open_model(str(GOLDENS / "phi3-longrope"), 2, layers=1).plan.layers == 1


@pytest.mark.parametrize("alias", ["su", "yarn", "longrope"])
def test_names_of_longrope_in_phi3(alias):
    scaling = {"type": alias, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = parse_config({**CONFIG, **PHI3, "rope_scaling": scaling}, "here")
    assert (config.rope.rope_type, config.rope.original_max_position_embeddings) == ("longrope", 4096)


def test_phi_rotates_a_part_of_each_head():
    fields = {**CONFIG, **PHI3, "hidden_size": 64, "partial_rotary_factor": 0.75}  # 12 of 16 dimensions
    assert parse_config(fields, "here").rotary_dim == 12
    inner = {"rope_parameters": {"partial_rotary_factor": 0.5}}
    assert parse_config({**fields, **inner}, "here").rotary_dim == 8  # this one comes first
    scaling = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}
    for change, words in (
        ({"partial_rotary_factor": 0.7}, "an even number of each head's 16 dimensions, not 11"),
        ({"partial_rotary_factor": 0.01}, "dimensions, not 0"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5, expected a number above 0, up to 1"),
        ({"partial_rotary_factor": 0}, "expected a number above 0, up to 1"),
        ({"partial_rotary_factor": "0.5"}, "expected a number above 0, up to 1"),
        ({"rope_scaling": scaling}, "has 8 numbers, expected a list of 6 positive numbers, one for each"),
    ):
        with pytest.raises(InputError, match=words):
            parse_config({**fields, **change}, "here")


SMOLLM3 = {"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "num_hidden_layers": 4}


@pytest.mark.parametrize(
    ("fields", "without"),
    [
        ({}, {3}),
        ({"no_rope_layer_interval": 2}, {1, 3}),
        ({"no_rope_layer_interval": 1}, {0, 1, 2, 3}),
        ({"no_rope_layers": [1, 0, 1, 1, 0], "no_rope_layer_interval": None}, {1}),
    ],
)
def test_layers_without_rope(fields, without):
    fields = {**CONFIG, **SMOLLM3, **fields}
    assert parse_config(fields, "here").layers_without_rope == without
    assert Oracle(fields, None).turns == [i not in without for i in range(4)]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"no_rope_layers": [1, 0, 1]},
            "no_rope_layers is [1, 0, 1], expected a list of 4 numbers, each 0 or 1",
        ),
        ({"no_rope_layers": [1, 0, 1, 2]}, "no_rope_layers is [1, 0, 1, 2], expected"),
        ({"no_rope_layers": 3}, "no_rope_layers is 3, expected"),
        ({"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0, expected a positive integer"),
        ({"layer_types": 5}, "layer_types is 5, expected"),
        ({"mlp_bias": "yes"}, "mlp_bias is 'yes', expected true or false"),
    ],
)
def test_malformed_layer_lists_of_smollm3_are_rejected(fields, words):
    with pytest.raises(InputError) as caught:
        parse_config({**CONFIG, **SMOLLM3, **fields}, "here")
    assert words in str(caught.value)
