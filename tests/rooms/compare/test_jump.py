"""The judgement of 16-bit steps by their inputs: no right run is blamed, and small faults are found."""

import ml_dtypes
import numpy as np
import pytest
from dump_files import command
from eager_engine import eager_steps
from paths import GOLDENS
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny import write_tiny

from minitp.comm.threads import run_threads
from minitp.compare.inputs import INPUTS, STREAM
from minitp.compare.run import compare_files
from minitp.device import open_device
from minitp.load import load_model
from minitp.loading.source import open_model
from minitp.oracle import ops
from minitp.trace.names import AFTER, BEFORE, LAYER
from minitp.trace.record import passes_of, wanted_steps
from minitp.trace.reference import open_oracle
from minitp.trace.write import write_oracle_trace, write_trace

NAMES = sorted(path.parent.name for path in GOLDENS.glob("*/config.json"))
AT = "prefill/layers.1.{}"
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
TOKENS = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 3, 50, 60, 70, 80, 90]  # longer than the goldens' windows
PASSES = passes_of(len(TOKENS), 1)


def oracle_trace(path, model):
    source = open_model(str(model), 1)
    write_oracle_trace(path, source, TOKENS, PASSES, wanted_steps(source.plan, PASSES, ["*"], oracle=True))
    return path


def trace(path, model, tp, dtype, steps=None):
    def rank(comm):
        source = open_model(str(model), tp)
        wanted = wanted_steps(source.plan, PASSES, steps)
        write_trace(path, source, load_model(source, comm, open_device(dtype)), TOKENS, PASSES, wanted)

    run_threads(tp, rank)
    return path


def jumps(result):
    return [(step.name, step.note) for step in result.steps if step.jumps]


def test_the_table_of_inputs_has_every_step():
    not_judged = {"tokens", "positions", "embed_partial", "mlp.experts"}
    assert INPUTS.keys() == (BEFORE | LAYER | AFTER).keys() - not_judged
    steps = list(BEFORE | LAYER | AFTER)
    for step, choices in INPUTS.items():
        for name in {name for choice in choices for name in choice} - {STREAM}:
            assert steps.index(name) < steps.index(step)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_right_runs_do_not_jump(tmp_path, monkeypatch, name, dtype):
    """Check minitp on 1, 2 or 4 ranks, and an engine that rounds much more, for each family."""
    a = oracle_trace(tmp_path / "a.safetensors", GOLDENS / name)
    tp = (1, 2, 4)[NAMES.index(name) % 3]
    b = trace(tmp_path / "b.safetensors", GOLDENS / name, tp, dtype, None if tp == 2 else ["*"])
    assert jumps(compare_files(a, b)) == []
    with safe_open(a, framework="np") as file:
        ids = [*TOKENS, int(file.get_tensor("decode.1/tokens")[0])]
    save_file(
        eager_steps(monkeypatch, GOLDENS / name, ids, PASSES, DTYPES[dtype]), tmp_path / "c.safetensors"
    )
    result = compare_files(a, tmp_path / "c.safetensors")
    assert len(result.steps) > 80
    assert jumps(result) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_scores_of_sharp_attention_do_not_jump(tmp_path, monkeypatch, dtype):
    """Check scores of several hundred: an engine that rounds them changes their probabilities by far more."""
    model = write_tiny(tmp_path / "model", tokenizer=False)
    weights = load_file(model / "model.safetensors")
    for name in weights:
        weights[name] *= 100 if name.endswith("q_proj.weight") else 1
    save_file(weights, model / "model.safetensors")
    a = oracle_trace(tmp_path / "a.safetensors", model)
    ids = [*TOKENS, int(load_file(a)["decode.1/tokens"][0])]
    steps = eager_steps(monkeypatch, model, ids, PASSES, DTYPES[dtype])
    not_dumped = (".scores", ".probs")
    steps = {name: array for name, array in steps.items() if not name.endswith(not_dumped)}
    save_file(steps, tmp_path / "b.safetensors")
    assert jumps(compare_files(a, tmp_path / "b.safetensors")) == []


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return (A, arrays of a bfloat16 run) of a Llama model."""
    folder = tmp_path_factory.mktemp("jump")
    a = oracle_trace(folder / "a.safetensors", GOLDENS / "llama3")
    return a, load_file(trace(folder / "b.safetensors", GOLDENS / "llama3", 1, "bfloat16"))


@pytest.fixture
def compared(files, tmp_path):
    """Return a function that compares A with the run, after some steps of layer 1 have been replaced."""

    def run(changes, pass_name="prefill", tolerance=None):
        a, b = files
        steps = {
            f"{pass_name}/layers.1.{name}": array.astype(DTYPES["bfloat16"])
            for name, array in changes.items()
        }
        assert steps.keys() <= b.keys()
        save_file(b | steps, tmp_path / "b.safetensors")
        return compare_files(a, tmp_path / "b.safetensors", tolerance=tolerance)

    return run


@pytest.fixture
def step(files):
    """Return a function that gives a step of layer 1 of the run, in float64."""
    return lambda name: files[1][f"prefill/layers.1.{name}"].astype(np.float64)


def attention(step, factor):
    q, k, v = step("attn.q_rope"), step("attn.k_cache"), step("attn.v_cache")
    mask = ops.causal_mask(np.arange(len(TOKENS)), np.arange(len(TOKENS)))
    return ops.context(ops.softmax(factor * ops.scores(q, k, mask)), v)


@pytest.mark.parametrize("factor", [1.1, 0.9])
def test_a_scale_that_is_slightly_wrong_in_one_layer(compared, step, factor):
    assert compared({"attn.context": attention(step, 1)}).departing == []
    first = compared({"attn.context": attention(step, factor)}).departing[0]
    assert first.name == "prefill/layers.1.attn.context"
    assert first.relative < first.tolerance == 0.1
    assert first.note.startswith("its error jumps from ")
    assert f"as if the scores were {factor} times as large" in first.note


FAULTS = {  # step of layer 1 -> the array in B
    "attn.norm": lambda step: 1.04 * step("attn.norm"),
    "attn.q_rope": lambda step: ops.rope(step("attn.q"), 1.01 * np.arange(len(TOKENS)), frequencies()),
    "attn.k_cache": lambda step: step("attn.k_rope") * np.where(np.arange(len(TOKENS)) == 3, 0.9, 1)[:, None],
    "attn.q": lambda step: 1.09 * step("attn.q"),
    "attn.residual": lambda step: step("attn.residual") + 0.05 * step("attn.out"),
    "mlp.act": lambda step: step("mlp.up") * step("mlp.gate") / (1 + np.exp(-1.1 * step("mlp.gate"))),
}


def frequencies():
    return open_oracle(open_model(str(GOLDENS / "llama3"), 1)).rotations[0][0]


@pytest.mark.parametrize("name", FAULTS)
def test_small_faults_are_named(compared, step, name):
    """Check that the step is named first, although its error is below the tolerance."""
    result = compared({name: FAULTS[name](step)})
    assert (result.departing[0].name, result.departing[0].jumps) == (f"prefill/layers.1.{name}", True)
    assert result.departing[0].relative < 0.1
    assert compared({name: FAULTS[name](step)}, tolerance=0.1).departing == [], (
        "only the given tolerance counts"
    )


def test_a_wrong_embedding_has_no_inputs(files, tmp_path):
    a, b = files
    save_file(
        b | {"prefill/embed": (b["prefill/embed"] * 1.03).astype(DTYPES["bfloat16"])},
        tmp_path / "b.safetensors",
    )
    first = compare_files(a, tmp_path / "b.safetensors").departing[0]
    assert first.name == "prefill/embed"
    assert first.note.startswith("its error is 3")
    assert "of which bfloat16 explains 1.6%" in first.note


def test_a_stale_cache_in_a_decode_pass(files, compared):
    cache = files[1]["decode.1/layers.1.attn.k_cache"].astype(np.float64)
    assert compared({"attn.k_cache": cache}, "decode.1").departing == []
    cache[:, 2] *= 0.9
    (first, *_) = compared({"attn.k_cache": cache}, "decode.1").departing
    assert (first.name, first.jumps) == ("decode.1/layers.1.attn.k_cache", True)


def test_a_step_without_its_inputs_has_only_the_tolerance(files, tmp_path, step):
    a, b = files
    b = {name: array for name, array in b.items() if "v_cache" not in name}
    b["prefill/layers.1.attn.context"] = attention(step, 1.1).astype(DTYPES["bfloat16"])
    save_file(b, tmp_path / "b.safetensors")
    assert "prefill/layers.1.attn.context" not in dict(jumps(compare_files(a, tmp_path / "b.safetensors")))


def test_the_verdict_says_why(files, tmp_path, capsys, step):
    a, b = files
    context = attention(step, 1.1).astype(DTYPES["bfloat16"])
    save_file(b | {"prefill/layers.1.attn.context": context}, tmp_path / "b.safetensors")
    code, out = command(capsys, a, tmp_path / "b.safetensors")
    assert code == 1
    verdict = out.splitlines()[-1]
    assert " (tolerance 0.1), too large for its inputs; largest difference at " in verdict
    assert "recomputed from B's inputs, it differs by " in verdict


@pytest.mark.parametrize(
    ("norm", "gate", "departing"), [(1.095, 1.11, ""), (1.2, 1.25, "norm"), (1.2, 1.4, "norm gate")]
)
def test_an_error_that_the_inputs_explain_may_be_larger(files, tmp_path, capsys, norm, gate, departing):
    """Check a product above the tolerance whose input, which cannot be judged, is almost as wrong."""
    a, b = files
    b = {name: array for name, array in b.items() if name not in map(AT.format, ("attn.residual", "mlp.act"))}
    for name, factor in (("mlp.norm", norm), ("mlp.gate", gate)):
        b[AT.format(name)] = (b[AT.format(name)].astype(np.float64) * factor).astype(DTYPES["bfloat16"])
    save_file(b, tmp_path / "b.safetensors")
    result = compare_files(a, tmp_path / "b.safetensors")
    assert [step.name for step in result.departing] == [
        AT.format(f"mlp.{name}") for name in departing.split()
    ]
    step = next(step for step in result.steps if step.name == AT.format("mlp.gate"))
    assert step.tolerance == pytest.approx(0.3)
    assert step.note.startswith("explained by its inputs") == (departing != "norm gate")
    _, out = command(capsys, a, tmp_path / "b.safetensors")
    if not departing:
        assert "(for bfloat16), 1 of them up to 0.3 as their inputs explain" in out.splitlines()[-1]


def test_logits_are_judged_without_a_shift_of_each_row(files, tmp_path):
    """Check that an error which all logits of a row share is explained: it changes no probability."""
    a, b = files
    shift = 0.5 * np.sqrt(np.mean(np.square(b["prefill/logits"]), axis=-1, keepdims=True))  # [T, 1]
    for factor, departs in ((0.4, False), (0.9, True)):
        logits = (b["prefill/logits"] + factor * shift).astype(np.float32)
        save_file(b | {"prefill/logits": logits}, tmp_path / "b.safetensors")
        steps = {step.name: step for step in compare_files(a, tmp_path / "b.safetensors").steps}
        step = steps["prefill/logits"]
        assert (step.departs, step.jumps) == (departs, False)


def test_other_experts_are_named(tmp_path, files):
    a = oracle_trace(tmp_path / "a.safetensors", GOLDENS / "mixtral")
    b = {
        name: array.astype(DTYPES["bfloat16"]) if array.dtype == np.float64 else array
        for name, array in load_file(a).items()
    }
    router, experts = (f"prefill/layers.0.mlp.{step}" for step in ("router", "experts"))
    b[router], b[experts] = b[router].copy(), b[experts].copy()
    b[router][2] = b[router][2, ::-1]
    b[experts][2] = b[experts][2, ::-1]
    save_file(b, tmp_path / "b.safetensors")
    notes = {step.name: step.note for step in compare_files(a, tmp_path / "b.safetensors").departing}
    assert notes[experts] == "B's router logits choose other experts for tokens [2]"
