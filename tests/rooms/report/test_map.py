"""Tests of what the map shows of weights, of passes, and of errors that are wrong only as a whole."""

from chromium import needs_chromium
from report_data import check_data, many_passes, spoilt_data, total_data

MOE = "model.layers.*.block_sparse_moe.experts.*.w2.weight"


@needs_chromium
def test_a_spoilt_weight_is_what_the_page_opens_on(drive):
    script = """
      const seen = { ...state(), detail: text('#detail'), tags: text('.tags'), summary: text('#summary'),
        whole: page.body.innerText, growth: text('#growth'), shown: text('#shown'),
        selected: one('#map [aria-selected]').classList.value,
        counts: all('.thumbs button').map(thumb => [thumb.title.split(':')[0], thumb.textContent]) };
      one('.thumbs button[title^="prefill rank 0"]').click();
      seen.rank = text('.tags');
      one('.thumbs button[title^="weights rank 1"]').click();
      seen.again = [text('#detail h2'), text('.tags'), count('.thumbs [aria-pressed=true]')];
      return seen;"""
    data, experts = spoilt_data(), spoilt_data(MOE, layer=2, tp=2, experts=8)
    one, moe = drive(script, data, experts)
    assert (one["error"], one["bad"], moe["error"], moe["bad"]) == (None, 1, None, 1)
    assert one["name"] == "weights/model.layers.1.mlp.down_proj.weight"
    assert moe["name"] == "weights/model.layers.2.block_sparse_moe.experts.5.w2.weight"
    assert one["tags"] == moe["tags"] == "✕ the first wrong tensorrank 1sharded"
    assert "bad" in one["selected"]
    assert "blamed" in one["selected"]
    assert "1 out of bounds" in one["summary"]
    assert one["whole"].count(data["verdict"]) == 1
    assert one["shown"] == "Shown: the worst of all passes, rank 1."
    # The index in the rank's slice, and in the tensor, whose columns 384 to 767 this rank holds.
    for text in ("at index3, 28", "in the tensor3, 412", "Read by mlp.out_partial.", "axis 1, 384 to 768"):
        assert text in one["detail"]
    assert "layer 1: down_proj is wrong" in one["growth"]
    wrong = {name for name, count in one["counts"] if count != "✓"}
    assert wrong == {
        "all passes worst over ranks",
        "all passes rank 1",
        "weights worst over ranks",
        "weights rank 1",
    }
    assert one["rank"] == "✓ within boundsrank 0sharded"
    assert one["again"] == [one["name"], one["tags"], 1]


@needs_chromium
def test_a_total_error_out_of_bounds_is_red_and_said(drive):
    script = """
      const seen = { ...state(), note: text('#detail .note'), tags: text('.tags'),
        table: text('#detail table') };
      send(one('#map [aria-selected]'), view.PointerEvent, 'pointermove', { pointerType: 'mouse' });
      seen.tip = text('#tip');
      at('layers.2.attn.q').click(); seen.other = text('.tags');
      const ink = selector => view.getComputedStyle(one(selector)).color;
      seen.warnings = [text('#warnings'), ink('#warnings') === ink('#summary')];
      return seen;"""
    (page,) = drive(script, total_data() | {"warnings": ["attn.q rounds more than once"]})
    assert (page["error"], page["bad"]) == (None, 27)
    assert page["note"] == "The local error is within its bound, and the total error is not."
    assert page["tags"].startswith("✕ the first wrong stepall ranks")
    assert "its bound4.0e-71.0e-5" in page["table"]
    assert "✕ total error out of bounds" in page["tip"]
    assert "total error 0.99, bound 1.0e-5" in page["tip"]
    assert page["other"].startswith("✕ total error out of bounds")
    assert page["warnings"] == ["attn.q rounds more than once", True]


@needs_chromium
def test_many_passes_have_a_list_that_scrolls(drive):
    script = """
      const box = one('.thumbs').getBoundingClientRect();
      const pressed = one('.thumbs [aria-pressed=true]').getBoundingClientRect();
      const seen = { ...state(), height: box.height, rows: count('.thumbs .pass'),
        inside: pressed.top >= box.top && pressed.bottom <= box.bottom + 1,
        row: Math.max(...all('.thumbs button').map(button => button.getBoundingClientRect().height)),
        labels: all('#growth .pass').map(label => label.textContent), shown: text('#shown') };
      one('.thumbs button').click(); seen.all = [text('#detail h2'), text('#shown'), count('#map td.bad')];
      return seen;"""
    passes = many_passes()
    data = check_data(tp=2, layers=2, passes=passes, fault=(21, 1, "attn.k_cache", 1))
    blamed = data["cells"][data["blamed"]]
    for cell in data["cells"]:  # the next pass is more wrong, but not blamed
        if cell["pass"] == 22 and all(cell[key] == blamed[key] for key in ("layer", "step", "rank")):
            cell |= {"ok": False, "local": blamed["local"] | {"relative": 0.9}}
    passing = check_data(tp=2, layers=2, passes=passes)
    page, fine = drive(script, data, passing)
    assert page["error"] is fine["error"] is None
    assert page["name"] == f"{passes[21]}/layers.1.attn.k_cache"
    assert page["rows"] == len(passes) + 2  # and all of them, and the weights
    assert page["height"] <= 300
    assert page["row"] <= 26
    assert page["inside"]  # scrolled to the pass that is shown
    assert page["labels"] == [passes[21]]  # of so many curves, only the selected one is named
    assert page["shown"] == f"Shown: {passes[21]}, rank 1."
    assert page["all"] == [page["name"], "Shown: the worst of all passes and ranks.", 1]
    assert fine["shown"] == "Shown: the worst of all passes and ranks."
