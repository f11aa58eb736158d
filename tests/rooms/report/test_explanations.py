"""Tests of what a report explains: the steps, the drawing of a layer, the growth of the error, the run."""

import re
import subprocess
import sys

import pytest
from chromium import needs_chromium
from paths import GOLDENS, ROOT
from report_compare_data import compare_layers_data
from report_data import check_data

from minitp.loading.config import read_config
from minitp.report.steps import EXPLAINED, LETTERS, explain, shape, source_line
from minitp.trace import names
from minitp.util.this_run import command_line, facts

STEPS = names.BEFORE | names.LAYER | names.AFTER


def test_every_step_has_an_explanation():
    assert EXPLAINED.keys() == LETTERS.keys() >= STEPS.keys()
    for operation, formula, sentence in EXPLAINED.values():
        assert formula
        assert re.fullmatch(r"[A-Z].*[.]", sentence)
        path, line = source_line(operation).split(":")
        lines = (ROOT / path).read_text().split("\n")[int(line) - 1 : int(line) + 2]
        assert f"def {operation.partition('.')[2]}(" in " ".join(lines)


def test_an_operation_that_a_test_has_replaced_has_no_source(monkeypatch):
    monkeypatch.setattr("minitp.ops.softmax", lambda xp, scores: scores)
    assert source_line.__wrapped__("ops.softmax") == ""


def test_shapes_are_those_of_one_rank_or_of_the_whole():
    assert shape("attn.q_rope") == "[H_r, T, d]"
    assert shape("attn.context") == "[T, H_r·d]"
    assert shape("attn.out_partial") == "[T, D]"
    assert (shape("logits_partial"), shape("logits")) == ("[T, V_r]", "[T, V]")
    operation, formula, sentence = EXPLAINED["attn.k_cache"]
    expected = ["[K, S, d]", formula, operation, sentence, source_line(operation)]
    assert explain(["attn.k_cache", "foreign"], per_rank=False) == {"attn.k_cache": expected}


@pytest.mark.parametrize(
    ("golden", "step", "formula", "operation"),
    [
        ("llama2", "attn.norm", EXPLAINED["attn.norm"][1], "ops.rms_norm"),
        ("llama2", "attn.out", "Σ_r out_partial_r", "comm.all_reduce"),
        ("llama2", "attn.scores", EXPLAINED["attn.scores"][1], "ops.attention_scores"),
        ("llama-bias", "attn.out", "Σ_r out_partial_r + bias", "comm.all_reduce"),
        ("gemma2", "final_norm", "x / √(mean(x²) + eps) · (1 + w)", "ops.rms_norm_plus_one"),
        ("gemma2", "mlp.act", "gelu(gate) · up", "ops.geglu"),
        ("gemma2", "mlp.residual", "x + post_norm", "Model._all_reduce_and_add"),
        ("granite", "logits_partial", "final_norm W_lm_head,r / 8", "ops.logits_partial"),
        ("mixtral", "attn.out_partial", "context_r W_o,r", "ops.row_parallel"),
        ("mixtral", "mlp.experts", "silu(norm W_gate,r) · norm W_up,r", "moe.experts_act"),
        ("qwen2", "attn.q", "norm W_q,r + b_q,r", "ops.column_parallel"),
        ("qwen3-moe", "mlp.experts", "silu(norm W_gate,r) · norm W_up,r", "moe.experts_act"),
        ("gemma3", "attn.q_norm", "x / √(mean(x²) + eps) · (1 + w)", "ops.rms_norm_plus_one"),
        ("qwen3", "attn.q_rope", "q_norm cos θ + rotate_half(q_norm) sin θ", "ops.apply_rope"),
    ],
)
def test_families_have_their_own_formulas(golden, step, formula, operation):
    _, found, by, _, _ = explain(STEPS, read_config(GOLDENS / golden))[step]
    assert (found, by) == (formula, operation)


def test_multipliers_and_caps_are_in_the_formulas():
    gemma, granite = (explain(STEPS, read_config(GOLDENS / name)) for name in ("gemma2", "granite"))
    assert re.fullmatch(r"\d+ · tanh\(\(q · k .*\) / \d+\), and −∞ where masked", gemma["attn.scores"][1])
    assert re.fullmatch(r"\d+ · tanh\(\(final_norm W_lm_head,r\) / \d+\)", gemma["logits_partial"][1])
    assert re.fullmatch(r"[\d.]+ · E\[token\] if .*", granite["embed_partial"][1])
    assert re.fullmatch(r"x \+ [\d.]+ · out", granite["attn.residual"][1])
    smollm3 = explain(STEPS, read_config(GOLDENS / "smollm3"))["attn.k_rope"][3]
    assert re.search(r"Layers without RoPE, where θ is 0: \d+", smollm3)
    phi = explain(STEPS, read_config(GOLDENS / "phi3-partial"))["attn.q_rope"][3]
    assert phi.endswith("Only the first 6 of each head's 8 dimensions are rotated.")
    gemma3 = explain(STEPS, read_config(GOLDENS / "gemma3"))["attn.k_rope"][3]
    assert gemma3.endswith("The layers with a window have a RoPE of their own.")
    mixtures = [explain(STEPS, read_config(GOLDENS / name)) for name in ("qwen3-moe", "qwen3-moe-window")]
    over = [found["mlp.out_partial"][3].rpartition("over ")[2] for found in mixtures]
    assert over == ["all experts.", "these experts, so that they add up to 1."]


@needs_chromium
def test_a_step_is_explained_where_it_is_pointed_at_and_where_it_is_selected(drive):
    script = """
      const seen = { selected: text('#detail'), collapsed: text('.sentence') };
      const hover = target => send(target, view.PointerEvent, 'pointermove', { pointerType: 'mouse' });
      hover(at('layers.2.attn.scores')); seen.cell = text('#tip');
      hover(at('weights/model.layers.2.self_attn.q_proj.weight')); seen.tensor = text('#tip');
      hover(one('th[data-step="attn.probs"]')); seen.heading = text('#tip');
      hover(one('#layer [data-step="mlp.act"]')); seen.box = text('#tip');
      return seen;"""
    (seen,) = drive(script, check_data(layers=5, passes=2, fault=(1, 3, "attn.k_cache", 2)))
    for part in (EXPLAINED["attn.k_cache"][2], "[earlier keys, k_rope]", "[K_r, S, d]", "KVCache.append"):
        assert part in seen["selected"]
    operation, formula, sentence = EXPLAINED["attn.scores"]
    lines = [sentence, formula, f"[H_r, T, S]  {operation}  {source_line(operation)}"]
    assert seen["cell"].split("\n")[-3:] == lines
    assert "[576, 576]  Loader.load  minitp/loading/weights.py:" in seen["tensor"]
    line = f"[H_r, T, S]  ops.softmax  {source_line('ops.softmax')}"
    assert seen["heading"].split("\n")[::3] == ["attn.probs", line]
    assert seen["box"].split("\n")[-1] == f"[T, F_r]  ops.swiglu  {source_line('ops.swiglu')}"


@needs_chromium
def test_the_drawing_of_a_layer_follows_the_selection(drive):
    script = """
      const boxes = kind => all(`#layer [data-step]${kind}`).map(box => box.dataset.step);
      const seen = { boxes: boxes(''), meets: all('#layer text.meets').map(bar => bar.textContent),
        now: boxes('.now'), wrong: boxes('.wrong'), pieces: count('#layer [data-step="attn.q"] .piece') };
      at('layers.1.attn.v').click(); seen.moved = [boxes('.now'), boxes('.wrong')];
      at('weights/model.layers.1.mlp.down_proj.weight').click(); seen.reader = boxes('.now');
      send(one('#layer [data-step="mlp.up"]'), view.MouseEvent, 'click'); seen.clicked = text('#detail h2');
      send(one('#layer [data-step="logits"]'), view.MouseEvent, 'click'); seen.after = text('#detail h2');
      return seen;"""
    full = check_data(layers=5, passes=2, fault=(1, 3, "attn.k_cache", 2))
    (seen,) = drive(script, full)
    assert sorted(seen["boxes"]) == sorted(STEPS)
    assert seen["meets"] == [f"{name}: all ranks" for name in ("all-reduce",) * 3 + ("all-gather",)]
    assert seen["now"] == seen["wrong"] == ["attn.k_cache"]
    assert seen["pieces"] == 4
    assert seen["moved"] == [["attn.v"], []]  # layer 1 has no wrong step
    assert seen["reader"] == ["mlp.out_partial"]  # the step that reads the tensor
    assert (seen["clicked"], seen["after"]) == ("decode.1/layers.1.mlp.up", "decode.1/logits")


@needs_chromium
def test_only_a_share_near_the_bound_has_a_warm_color(drive):
    data = check_data(tp=1, layers=1, passes=1)
    shares = {"attn.q": 0.1, "attn.k": 0.59, "attn.v": 0.79, "attn.probs": 0.81, "attn.context": 0.99}
    for cell in data["cells"]:
        if cell["step"] in shares:
            cell["local"] = {"relative": shares[cell["step"]], "bound": 1}
    script = """
      const steps = %s, seen = {};
      const tint = step => view.getComputedStyle(at(`layers.0.${step}`)).backgroundColor;
      for (const step of steps) seen[step] = tint(step);
      one('[value=total]').click(); seen.total = tint('mlp.residual');
      return seen;"""
    (seen,) = drive(script % list(shares), data)
    colors = {
        key: [float(x) for x in re.match(r"oklch\((\S+) (\S+) (\S+)\)", text).groups()]
        for key, text in seen.items()
    }
    for step, share in shares.items():
        _, chroma, hue = colors[step]
        assert (chroma > 0.06) == (share > 0.8), step
        assert 60 <= hue <= 95 if share > 0.8 else 225 <= hue <= 255, step
    assert 290 <= colors["total"][2] <= 320  # violet: green means passed


@needs_chromium
def test_the_growth_of_the_error_is_drawn_whole(drive):
    failing = check_data(layers=5, passes=2, fault=(1, 3, "attn.k_cache", 2))
    zero = check_data(tp=1, layers=2, passes=1)
    for cell in zero["cells"]:
        if cell["step"] == "embed" or (cell["layer"], cell["step"]) == (1, "attn.residual"):
            cell["total"]["relative"] = 0.0
        if cell["step"] == "mlp.residual":
            cell["total"]["relative"] = float("inf")
    script = """
      const curves = name => all('.curve').map(path => path.getAttribute(name));
      return { error: state().error, words: text('#growth-what'), paths: curves('d'),
        strokes: curves('stroke'), said: all('#growth text').map(label => label.textContent),
        width: one('#growth svg').clientWidth };"""
    wrong, zeros = drive(script, failing, zero)
    assert wrong["error"] is zeros["error"] is None
    assert "the embedding, each attention block and each MLP block" in wrong["words"]
    assert "layer 3: attn.k_cache is wrong" in wrong["said"]
    assert len(set(wrong["strokes"])) == 2
    for page, layers in ((wrong, 5), (zeros, 2)):
        places = [[float(x) for x in point.split()] for point in page["paths"][0][1:].split("L")]
        assert len(places) == 1 + 2 * layers
        assert places[0][0] == 58  # the left end of the axis
        assert page["width"] - 120 < places[-1][0] < page["width"]
    assert {"0", "not finite"} <= set(zeros["said"])
    heights = [float(point.split()[1]) for point in zeros["paths"][0][1:].split("L")]
    assert heights[0] == heights[3] == max(heights)
    assert heights[2] == heights[4] == min(heights)


@needs_chromium
def test_the_report_as_markdown(drive):
    data = check_data(layers=5, passes=2, fault=(1, 3, "attn.k_cache", 2))
    data["facts"].append(["prompt", "a | b\n`c`"])
    script = """
      let copied = null;
      const writeText = text => { copied = text; return Promise.resolve(); };
      Object.defineProperty(view.navigator, 'clipboard', { value: { writeText } });
      one('#copy').click();
      return { copied };"""
    failed, passed = drive(script, data, check_data(layers=2))
    text = failed["copied"]
    assert text.startswith("### minitp check: smollm2 on 4 ranks\n\n**Failed**: first wrong step: decode.1/")
    assert "\n```sh\nminitp check 'The capital of France is' --tp 4 --report check.html\n```\n" in text
    assert "| prompt | a \\| b \\`c\\` |" in text
    blamed = data["cells"][data["blamed"]]
    assert f"\n`decode.1/layers.3.attn.k_cache`, layer 3, rank 2, sharded\n\n{blamed['note']}\n" in text
    assert "\n| local | 0.31 | 4.0e-7 | 0.93 | 1.2e-5 |\n| total |" in text
    index, value, expected = blamed["worst"][0]
    row = re.search(rf"\n\| {index[0]}, {index[1]}, {index[2]} \| (\S+) \| (\S+) \| ", text)
    assert [float(number) for number in row.groups()] == pytest.approx([value, expected])
    assert re.search(r"\n\| 2 \| 0.31 \| 0.\d+ \| wrong \|\n\| 3 \| .* \| within bounds \|\n", text)
    assert "**Passed**" in passed["copied"]
    assert "wrong step" not in passed["copied"]


@needs_chromium
def test_on_a_phone_the_numbers_are_a_sheet_that_opens_and_closes(drive):
    script = """
      const height = () => Math.round(one('#detail').getBoundingClientRect().height), seen = {};
      seen.start = height();
      one('.fold').click(); seen.open = height();
      seen.inside = one('#detail').getBoundingClientRect().bottom <= view.innerHeight;
      seen.expanded = one('.fold').getAttribute('aria-expanded');
      at('layers.1.attn.v').click(); seen.kept = height() > 100;
      one('.fold').click(); seen.folded = height();
      one('.close').click(); seen.closed = height();
      at('layers.1.attn.k').click(); seen.again = height();
      seen.hint = !one('#tensors-hint').hidden;
      seen.run = one('#run').open;
      return seen;"""
    data = check_data(layers=5, passes=2, fault=(1, 3, "attn.k_cache", 2))
    (phone,) = drive(script, data, width=400)
    assert phone["start"] == phone["folded"] == phone["again"] <= 64
    assert phone["open"] > 200
    assert phone["inside"]
    assert (phone["expanded"], phone["kept"], phone["closed"], phone["hint"]) == ("true", True, 0, True)
    (desk,) = drive(script.replace("one('.close').click();", ""), data)
    assert desk["start"] == desk["open"] > 300
    assert not desk["hint"]
    assert (phone["run"], desk["run"]) == (False, True)  # the facts are folded, too


@needs_chromium
def test_with_few_layers_the_growth_stands_next_to_the_map(drive):
    script = """return { inside: one('#left').contains(one('#growth svg')), said: text('#diagnosis'),
        note: text('#detail .note'),
        big: parseFloat(view.getComputedStyle(one('#diagnosis')).fontSize) };"""
    few, many = compare_layers_data(layers=7), compare_layers_data(layers=12)
    sentence = "position t of B is position t - 1 of A: shifted by one"
    few["cells"][few["blamed"]]["note"] = f"B is [T, K*d]; {sentence}"
    few["diagnosis"] = sentence
    short, long = drive(script, few, many)
    assert (short["inside"], long["inside"]) == (True, False)
    assert short["said"] == sentence
    assert short["note"] == "B is [T, K*d]"  # the diagnosis is not repeated
    assert short["big"] > 18


def test_the_run_can_be_repeated(monkeypatch):
    argv = ["check", "Once upon a time", "--tp", "2"]
    assert command_line("check", 2, argv) == "minitp check 'Once upon a time' --tp 2"
    assert command_line("check", 4, argv[:2]) == "minitp check 'Once upon a time' --tp 4"
    assert command_line("check", 4, ["check", "--tp=4"]) == "minitp check --tp=4"
    assert command_line("check", 4, ["-m", "pytest"]) == ""
    monkeypatch.setattr(sys, "argv", ["minitp", "compare", "a", "b"])
    found = dict(facts("compare", gpu="NVIDIA H100"))
    assert found["command"] == "minitp compare a b"
    assert found["machine"].startswith("NVIDIA H100, ")
    assert found.keys() == {"command", "machine", "minitp", "date"}


@pytest.mark.parametrize("command", ["check", "compare"])
def test_a_page_of_the_command_has_the_facts_and_names_its_documentation(tmp_path, tiny, command):
    page = tmp_path / "page.html"
    options = ["--tokens", "1,2,3", "--model", str(tiny), "--tp", "1"]
    argv = ["check", *options, "--report", str(page)]
    if command == "compare":
        dump = str(tmp_path / "a.safetensors")
        run("trace", *options, "-o", dump)
        argv = ["compare", dump, dump, "--report", str(page)]
    run(*argv)
    text = page.read_text()
    values = {"command": "minitp " + " ".join(argv), "machine": "", "minitp": "", "date": "20"}
    assert all(f'["{name}","{value}' in text for name, value in values.items())
    assert re.search(r'"explained":\{"(tokens|embed)"', text)
    assert f"docs/{command}.md" in text
    assert (ROOT / f"docs/{command}.md").exists()


def run(*argv):
    subprocess.run([sys.executable, "-m", "minitp", *argv], stdout=subprocess.DEVNULL, check=True)
