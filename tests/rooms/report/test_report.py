"""The report: one page that fetches nothing, shows every step, and survives hostile strings.

`drive`, in conftest.py, shows pages in a headless Chromium.
"""

import json
import re

import numpy as np
import pytest
from chromium import needs_chromium
from report_compare_data import compare_data, compare_layers_data, foreign_names
from report_data import HOSTILE, check_data

from minitp.errors import InputError
from minitp.report.page import render, write_report
from minitp.trace import names as steps


def hostile_data():
    """The data of a page in which every foreign string is hostile."""
    data = compare_data([HOSTILE, "x" * 300, *foreign_names(3)], passes=(HOSTILE,), wrong=[HOSTILE])
    data |= {"title": HOSTILE, "verdict": HOSTILE, "problems": [HOSTILE], "facts": [[HOSTILE, HOSTILE]]}
    data["facts"] += [["prompt", HOSTILE * 20], ["long", "y" * 150]]
    for cell in data["cells"]:
        cell |= {"note": HOSTILE, "kind": HOSTILE}
    return data


def json_of(page):
    """Return the data in a page, parsed strictly."""

    def refuse(constant):
        raise ValueError(constant)

    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    return json.loads(text, parse_constant=refuse)


@needs_chromium
def test_every_step_is_drawn_and_the_blamed_one_is_named(drive):
    failing = check_data(layers=5, passes=2, fault=(1, 3, "attn.k_cache", 2))
    ok, one, nine = check_data(layers=5), check_data(tp=1, layers=2, passes=1), check_data(tp=9, layers=2)
    missing = compare_layers_data(layers=12)
    foreign = compare_data(foreign_names(), wrong=["block05/o"])
    script = """return { ...state(), verdict: text('#verdict'), title: page.title, detail: text('#detail'),
        summary: text('#summary').replaceAll('\u202f', ''), heading: text('#errors-title'),
        blamed: count('#map td.blamed'), selected: count('#map [aria-selected]'),
        thumbs: count('.thumbs button'), none: count('#map td.none') };"""
    pages = drive(script, failing, ok, one, nine, missing, foreign)
    for page, data in zip(pages, (failing, ok, one, nine, missing, foreign), strict=True):
        assert page["error"] is None
        assert page["ready"]
        wide = len(data["before"]) + len(data["after"]) + len(data.get("beside", {}))
        assert page["cells"] == wide + data["layers"] * len([*data.get("weights", []), *data["steps"]])
        assert page["verdict"] == ("Passed" if data["ok"] else "Failed") + data["verdict"]
        assert page["title"] == data["title"]
        assert page["selected"] == 1
        assert page["blamed"] == (not data["ok"])
        wrong = sum(not cell["ok"] for cell in data["cells"])
        assert page["summary"].startswith(f"{len(data['cells'])} comparisons, {wrong} out of bounds.")
    assert [page["heading"] for page in pages] == [*["Every step"] * 5, "Every tensor"]
    assert "Closest to its bound" in pages[1]["summary"]
    assert pages[0]["name"] == "decode.1/layers.3.attn.k_cache"
    assert "the first wrong step" in pages[0]["detail"]
    assert "rank 2" in pages[0]["detail"]
    assert failing["cells"][failing["blamed"]]["note"] in pages[0]["detail"]
    assert pages[4]["name"] == "decode.1/layers.7.attn.k_rope"
    assert pages[5]["name"] == "block05/o"
    assert [page["bad"] for page in pages] == [
        1,
        0,
        0,
        0,
        sum(not cell["ok"] for cell in missing["cells"]),
        1,
    ]
    # a line for all passes, one for the weights, and one for each pass
    assert [page["thumbs"] for page in pages] == [4 * 5, 5 * 5, 0, 5 * 10, 3, 0]
    assert [page["none"] for page in pages] == [0, 0, 0, 0, 12 * 4 + 2, 0]


@needs_chromium
def test_nothing_is_wider_than_a_phone(drive):
    data = [
        check_data(layers=5, fault=(1, 3, "attn.k_cache", 2)),
        check_data(tp=9, layers=3),
        check_data(tp=8, layers=3, heads=64, kv_heads=8, ffn=28672, vocab=128256, head_dim=128),
        compare_data(foreign_names(), wrong=["block05/o"]),
        hostile_data(),
    ]
    script = """return { error: state().error, width: page.documentElement.scrollWidth,
        body: page.body.scrollWidth,
        cell: Math.min(...all('#map td.cell').map(td => Math.round(td.getBoundingClientRect().height))) };"""
    for page in drive(script, *data, width=390):
        assert page["error"] is None
        assert max(page["width"], page["body"]) <= 390
        assert page["cell"] >= 24  # large enough for a finger


@needs_chromium
def test_keys_clicks_and_the_pointer(drive):
    data = check_data(layers=5, passes=2, fault=(1, 3, "attn.k_cache", 2))
    second = next(cell for cell in data["cells"] if (cell["step"], cell["rank"]) == ("embed", 3))
    second["ok"], second["total"]["relative"] = False, 0.9  # in prefill
    script = """
      const seen = {}, name = () => text('#detail h2');
      one('#map [aria-selected]').focus();
      press('ArrowRight'); seen.right = name();
      press('ArrowDown'); seen.down = name();
      seen.focus = page.activeElement === one('#map [aria-selected]');
      for (let i = 0; i < 9; i++) press('ArrowUp');
      seen.top = name();
      at('embed_partial').click(); press('ArrowLeft'); seen.tensor = name();
      press('ArrowRight'); seen.back = name();
      at('layers.2.attn.v').click(); seen.click = name();
      seen.ranks = count('#detail td button');
      one('#detail td button').click(); seen.rank = text('.tags');
      const thumbs = label => all('.thumbs button').find(thumb => thumb.title.startsWith(label));
      thumbs('prefill worst').click(); seen.pass = name(); seen.shown = text('#shown');
      seen.pressed = count('.thumbs [aria-pressed=true]');
      seen.worst = count('#map td.bad');
      const tint = () => view.getComputedStyle(at('layers.2.attn.q')).backgroundColor, local = tint();
      one('[value=total]').click(); seen.recoloured = local !== tint();
      seen.marked = count('#map td.marked');
      all('.steps button')[1].click(); seen.next = `${name()} ${text('.tags')}`;
      seen.last = all('.steps button').map(button => button.disabled);
      all('.steps button')[0].click(); seen.previous = `${name()} ${text('.tags')}`;
      const light = colour('body');
      one('#theme').click(); const dark = colour('body');
      one('#theme').click(); seen.themes = [light !== dark, light === colour('body')];
      all('.steps button')[1].click();
      send(at('layers.3.attn.norm'), view.PointerEvent, 'pointermove', { pointerType: 'mouse' });
      seen.tip = [one('#tip').hidden, text('#tip').split('\\n')[0]];
      send(one('#map table'), view.PointerEvent, 'pointerleave'); seen.left = one('#tip').hidden;
      seen.error = state().error;
      return seen;"""
    (seen,) = drive(script, data)
    assert seen == {
        "right": "decode.1/layers.3.attn.v_cache",
        "down": "decode.1/layers.4.attn.v_cache",
        "focus": True,
        "top": f"decode.1/{next(iter(steps.BEFORE))}",
        "tensor": "weights/model.embed_tokens.weight",
        "back": "decode.1/embed_partial",
        "click": "decode.1/layers.2.attn.v",
        "ranks": 4,
        "rank": "✓ within boundsrank 0sharded",
        "pass": "prefill/layers.2.attn.v",
        "shown": "Shown: prefill, the worst of all ranks.",
        "pressed": 1,
        "worst": 1,
        "recoloured": True,
        "marked": 1,
        "next": "decode.1/layers.3.attn.k_cache ✕ the first wrong steprank 2sharded",
        "last": [False, True],
        "previous": "prefill/embed ✕ out of boundsrank 3replicated",
        "themes": [True, True],
        "tip": [False, "decode.1/layers.3.attn.norm  rank 2"],
        "left": True,
        "error": None,
    }


@needs_chromium
def test_hostile_strings_stay_strings(drive):
    script = """return { ...state(), title: page.title, images: count('img'), scripts: count('script'),
        heading: text('#title'), verdict: text('#verdict span'), problem: text('#problems'), fact: text('dd'),
        row: text('#map .name'), note: text('.note') };"""
    (page,) = drive(script, hostile_data())
    assert (page["error"], page["ready"]) == (None, True)
    assert (page["images"], page["scripts"]) == (0, 3)
    assert page["name"] == f"{HOSTILE}/{HOSTILE}"
    for key in ("heading", "verdict", "problem", "fact", "row", "note"):
        assert page[key] == HOSTILE, key
    assert "broken" in page["title"]  # as text


@needs_chromium
def test_nan_and_infinities_are_shown_as_wrong(drive):
    data = check_data(tp=1, layers=2, passes=1, fault=(0, 1, "attn.scores", 0))
    nan, inf = float("nan"), float("inf")
    cell = data["cells"][data["blamed"]]
    cell |= {"local": {"relative": nan, "bound": 1e-7}, "total": {"relative": inf}}
    cell["worst"] = [[[0, 1, 2], nan, -inf]]
    for later in data["cells"][data["blamed"] + 1 :]:
        later["total"]["relative"] = nan
    script = """const before = { ...state(), detail: text('#detail') };
      one('[value=total]').click();
      return { ...before, total: count('#map td.bad'), error: state().error };"""
    (page,) = drive(script, data)
    assert (page["error"], page["bad"]) == (None, 1)
    assert page["total"] == len(data["cells"]) - data["blamed"]
    for shown in ("relative errorNaNinf", "0, 1, 2NaN-inf"):
        assert shown in page["detail"]


def test_the_page_fetches_nothing():
    page = render(check_data(layers=2))
    assert "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'\"" in page
    assert re.findall(r"""(?:src|href|action)\s*=|@import|url\(|\bimport\b|fetch\(|XMLHttp""", page) == []
    assert set(re.findall(r"https?://[^'\"\s]*", page)) == {
        "http://www.w3.org/2000/svg"
    }  # the name of a namespace, which is not fetched


def test_the_data_cannot_end_its_script():
    clean, page = render(compare_data(["a"])), render(hostile_data())
    for markup in ("<script", "</script", "<!--", "<img"):
        assert page.lower().count(markup) == clean.lower().count(markup), markup
    held = json_of(page)
    assert held["title"] == held["before"][0] == held["cells"][0][4] == HOSTILE
    page.encode("utf-8")  # no lone surrogates


def test_the_verdict_is_there_without_javascript():
    page = render(check_data(layers=2) | {"title": "<b>", "verdict": "all & \ud800"})
    assert "<title>&lt;b&gt;</title>" in page
    assert re.search(r"<noscript>.*<h1>&lt;b&gt;</h1><p>Passed: all &amp; &#55296;</p>.*</noscript>", page)


def test_numpy_numbers_nan_and_infinities_are_packed():
    data = check_data(tp=1, layers=1, passes=1)
    error = {
        "relative": np.float32(0.1),
        "bound": float("nan"),
        "absolute": np.inf,
        "index": (np.int64(3), 4),
    }
    data["cells"][0] |= {"local": error, "rank": np.int64(0), "ok": np.bool_(False), "pass": np.int64(0)}
    data["cells"][0]["worst"] = [(np.array([1, 2]), np.float32(-np.inf), 16777217)]
    data["cells"][1]["rank"] = "all"
    cells = json_of(render(data))["cells"]
    assert cells[0][3] == 0
    assert cells[0][5:7] == [0, [0.1, "NaN", "inf", None, [3, 4]]]
    assert cells[0][8] == [[[1, 2], "-inf", 16777217]]
    assert cells[1][3] is None


def test_cells_lie_where_their_steps_are():
    data = check_data(tp=1, layers=2, passes=1)
    places = [(tuple(cell[:3])) for cell in json_of(render(data))["cells"]]
    tensors, n, before = 9, len(steps.LAYER), len(steps.BEFORE)
    embed = list(steps.BEFORE).index("embed_partial")
    weights = [(None, embed, 0), (None, before + 2, 0)]  # next to embed_partial and to final_norm
    weights += [(None, before + i, j) for j in range(tensors) for i in (0, 1)]
    wide = [(0, row, tensors) for row in range(before)]
    inner = [(0, before + i, tensors + j) for i in (0, 1) for j in range(n)]
    assert places == weights + wide + inner + [(0, before + 2 + row, tensors) for row in range(3)]


@pytest.mark.parametrize("place", [{"step": "attn.queue"}, {"layer": None}])
def test_a_step_without_a_place_is_refused(place):
    data = check_data(tp=1, layers=1, passes=1)
    data["cells"][5] |= place
    with pytest.raises(ValueError, match="no place for the step"):
        render(data)


def test_the_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.html"
    data = compare_data(["a"])
    write_report(path, data)
    assert path.read_text("utf-8") == render(data)
    with pytest.raises(InputError, match=r"nowhere.*cannot write the report"):
        write_report(tmp_path / "nowhere" / "out.html", data)
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(InputError, match="cannot write the report"):
        write_report(tmp_path / "folder.html", data)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.html", "out.html"]
