"""Tests of the page of `minitp compare --report`: the diagnosis, the pictures, weights, and zeros."""

import re

import numpy as np
import pytest
from chromium import needs_chromium
from report_compare_data import compare_layers_data

from minitp.cli.compare import verdict
from minitp.compare.picture import Pictures
from minitp.compare.run import compare_files
from minitp.report.compare import report_data

SHIFTED = "position t of B is position t - 1 of A: shifted by one"


@pytest.fixture
def data_of(tmp_path):
    """Return a function that compares two dicts of arrays and returns the data of the page."""

    def run(a, b):
        paths = tmp_path / "a.npz", tmp_path / "b.npz"
        for path, arrays in zip(paths, (a, b), strict=True):
            np.savez(path, **{name: array.astype(np.float32) for name, array in arrays.items()})
        pictures = Pictures()
        result = compare_files(*paths, pictures=pictures)
        return report_data(*map(str, paths), result, verdict(result), pictures.by_name())

    return run


def arrays(layers=2, weights=False):
    rng = np.random.default_rng(0)
    found = {"prefill/embed_partial": rng.standard_normal((6, 32))}
    for i in range(layers):
        found |= {f"prefill/layers.{i}.attn.q": rng.standard_normal((4, 6, 8))}
        found |= {f"prefill/layers.{i}.attn.residual": rng.standard_normal((6, 300))}
        if weights:
            for n in range(3):
                name = f"weights/model.layers.{i}.block_sparse_moe.experts.{n}.w2.weight"
                found |= {name: rng.standard_normal((5, 9))}
    if weights:
        found |= {"weights/model.embed_tokens.weight": rng.standard_normal((12, 32))}
        found |= {"weights/lm_head.weight": rng.standard_normal((12, 32))}
    return found


@needs_chromium
def test_the_diagnosis_is_large_and_said_once(drive, data_of):
    a = arrays()
    b = a | {"prefill/layers.1.attn.q": np.roll(a["prefill/layers.1.attn.q"], 1, axis=1)[None]}
    data = data_of(a, b)
    script = """return { ...state(), whole: page.body.innerText, said: text('#diagnosis'),
        verdict: text('#verdict'), note: text('#detail .note'),
        size: parseFloat(view.getComputedStyle(one('#diagnosis')).fontSize) };"""
    (page,) = drive(script, data)
    assert (page["error"], page["name"]) == (None, "prefill/layers.1.attn.q")
    assert page["said"] == SHIFTED
    assert page["whole"].count(SHIFTED) == 1
    assert page["note"] == "B is [1, H, T, d]"
    assert page["size"] > 18
    assert re.search(r"largest difference at \[.*\]: \S+ in A, \S+ in B$", page["verdict"])
    assert data["title"] == "b.npz against a.npz"


@needs_chromium
def test_a_b_and_their_difference_are_shown_for_the_selected_step(drive, data_of):
    a = arrays()
    b = {name: array.copy() for name, array in a.items()}
    b["prefill/layers.0.attn.residual"][2, 250] += 3
    b["prefill/layers.0.attn.residual"][4] = np.nan
    script = """
      const canvases = () => all('.pictures canvas');
      const size = () => canvases().map(({ width, height }) => [width, height]);
      const images = canvases().map(canvas => canvas.getContext('2d').getImageData(0, 0, 64, 6).data);
      const pixel = (n, x, y) => [...images[n].slice(4 * (64 * y + x), 4 * (64 * y + x) + 3)];
      const seen = { ...state(), names: all('.pictures h4').map(name => name.textContent), size: size(),
        words: text('.pictures figcaption') };
      const column = Math.floor(250 * 64 / 300);
      seen.off = pixel(2, column, 2); seen.fine = pixel(2, 3, 3); seen.nan = pixel(1, 3, 4);
      seen.same = [0, 1].map(n => pixel(n, 7, 1));
      const spot = one('.spot'); seen.spot = [parseFloat(spot.style.left), parseFloat(spot.style.top)];
      const { left, top, width, height } = one('.pictures canvas').getBoundingClientRect();
      const place = { clientX: left + (column + 0.5) * width / 64, clientY: top + 2.5 * height / 6 };
      send(one('.pictures canvas'), view.PointerEvent, 'pointermove', place);
      seen.tip = text('#tip').split('\\n');
      at('layers.1.attn.q').click(); seen.other = [size(), count('.spot'), text('.pictures figcaption')];
      return seen;"""
    (page,) = drive(script, data_of(a, b))
    assert (page["error"], page["name"]) == (None, "prefill/layers.0.attn.residual")
    assert page["names"] == ["A", "B", "|B − A|"]
    assert page["size"] == [[64, 6]] * 3
    assert (
        page["words"] == "6 × 64 blocks of [6, 300]; each shows its largest element. Rows are T, columns D."
    )
    red, green, blue = page["off"]
    assert red > 150 > green > blue  # beyond the tolerance
    assert min(page["fine"]) > 240  # no difference, on a light page
    assert page["same"][0] == page["same"][1]
    assert max(page["nan"]) - min(page["nan"]) < 12  # gray
    assert page["spot"][1] == pytest.approx(100 * 4.5 / 6)  # the largest difference is the NaN
    assert page["tip"][0] == "[2, 248 to 252]"
    assert page["tip"][3].startswith("difference ")
    assert float(page["tip"][3].split()[1]) == pytest.approx(3, rel=0.1)
    assert page["other"] == [[[8, 24]] * 3, 0, "[4, 6, 8], each element. Rows are H, T, columns d."]


@needs_chromium
def test_a_page_without_pictures(drive):
    script = "return { error: state().error, pictures: count('.pictures'), name: text('#detail h2') };"
    (page,) = drive(script, compare_layers_data(layers=9))
    assert (page["error"], page["pictures"]) == (None, 0)


@needs_chromium
def test_weights_are_cells_of_a_comparison_too(drive, data_of):
    a = arrays(weights=True)
    name = "weights/model.layers.1.block_sparse_moe.experts.1.w2.weight"
    data = data_of(a, a | {name: 2 * a[name], "prefill/layers.1.attn.q": -a["prefill/layers.1.attn.q"]})
    assert data["beside"] == {"embed_partial": "model.embed_tokens.weight"}
    script = """
      const texts = selector => all(selector).map(element => element.textContent);
      return { ...state(), tags: text('.tags'), heads: texts('#map th[data-step]'),
        wide: texts('#map .wide .name'),
        pictures: count('.pictures'), said: text('#diagnosis') };"""
    (page,) = drive(script, data)
    assert (page["error"], page["bad"], page["name"]) == (None, 2, name)
    assert page["tags"] == "✕ the first differing tensor"
    assert page["heads"] == ["w2", "q", "residual"]
    assert page["wide"] == ["embed_tokens", "embed_partial", "weights/lm_head.weight"]
    assert page["pictures"] == 1
    assert page["said"] == "B is 2 * A"
    only = data_of({name: a[name]}, {name: a[name]})
    (page,) = drive("return { ...state(), growth: one('#growth-section').hidden };", only)
    assert (page["error"], page["cells"], page["name"], page["growth"]) == (None, 2, name, True)


@needs_chromium
def test_an_error_of_zero_is_a_point_on_the_axis(drive, data_of):
    a = arrays(layers=60)
    b = a | {"prefill/layers.7.attn.residual": a["prefill/layers.7.attn.residual"] * 1.5}
    script = """
      const zero = all('#growth .dot.zero'), lows = new Set(zero.map(dot => dot.getAttribute('cy')));
      return { error: state().error, zeros: zero.length, heights: lows.size,
        low: Math.max(...[...lows].map(Number)),
        ticks: all('#growth text').map(tick => [tick.textContent, +tick.getAttribute('y')]) };"""
    one, same = drive(script, data_of(a, b), data_of(a, a))
    assert (one["error"], one["zeros"], one["heights"]) == (None, 59, 1)  # also in a curve of many points
    assert ["0", one["low"] + 4] in one["ticks"]
    assert (same["zeros"], same["heights"]) == (60, 1)
    assert ["0", same["low"] + 4] in same["ticks"]


def test_the_names_that_one_file_lacks_are_listed(data_of):
    a = arrays()
    embed = a["prefill/embed_partial"]
    facts = dict(data_of(a, {"prefill/embed_partial": embed, "mine": embed})["facts"])
    assert facts["only in A"].startswith("4: prefill/layers.0.attn.q, prefill/layers.0.attn.residual, ")
    assert facts["only in B"] == "1: mine"
