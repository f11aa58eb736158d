"""Tests of the sharding plan on the page of a check."""

from chromium import needs_chromium
from report_data import check_data, plan_data, spoilt_data


@needs_chromium
def test_the_plan_is_drawn(drive):
    data = check_data(layers=2, passes=1)
    broken = check_data(layers=2, passes=1)
    broken["plan"]["kv_head_ranges"][2] = (1, 2)  # query head 6 of rank 2 reads KV head 2
    script = """return { error: state().error, boxes: count('#drawing .box'), reads: count('#drawing .reads'),
        lost: count('#drawing .lost'), copies: count('#drawing .twice'), said: text('#copies'),
        rows: count('#tensors tbody tr'), table: text('#tensors'), lines: count('#growth .curve') };"""
    right, wrong = drive(script, data, broken)
    assert right["error"] is None
    # 9 query heads, 5 KV heads since two are held twice, and 4 parts of the FFN, the vocabulary and the bytes
    assert (right["boxes"], right["reads"], right["lost"], right["copies"]) == (9 + 5 + 3 * 4, 9, 0, 2)
    assert "1 on ranks 1, 2; 2 on ranks 2, 3." in right["said"]
    assert right["rows"] == 11
    assert "192:320" in right["table"]
    assert right["lines"] == 1
    assert (wrong["error"], wrong["lost"], wrong["copies"]) == (None, 1, 1)


@needs_chromium
def test_a_plan_that_fails_before_anything_runs(drive):
    data = check_data(layers=2, passes=1) | {"ok": False, "verdict": "the plan is wrong", "cells": []}
    data |= {"problems": ["rank 2: query head 5 reads KV head 1", "two"], "passes": [], "plan": None}
    (page,) = drive("return { ...state(), shown: page.body.innerText };", data)
    assert (page["error"], page["ready"], page["cells"]) == (None, True, 0)
    assert "query head 5 reads KV head 1" in page["shown"]
    assert "Every step" not in page["shown"]


@needs_chromium
def test_wrong_tensors_are_marked_at_their_ranks(drive):
    script = """return { error: state().error, marked: all('#tensors tr.marked').map(row => row.innerText),
        wrong: all('#tensors td.wrong').map(part => part.textContent), bars: count('#drawing .fault') };"""
    one, embed, planned = drive(
        script, spoilt_data(), spoilt_data("model.embed_tokens.weight", layer=None, rank=3), plan_data()
    )
    assert one["error"] is embed["error"] is planned["error"] is None
    assert (one["wrong"], len(one["marked"])) == (["✕ 384:768layer 1"], 1)
    assert one["marked"][0].startswith("model.layers.*.mlp.down_proj.weight\t")
    assert drive(script, spoilt_data(), width=400)[0]["marked"][0].startswith(
        "model.layers.*.mlp.down_proj.weight\n✕ rank 1"  # the marked part is out of sight, to the right
    )
    assert embed["wrong"] == ["✕ 36864:49152"]
    assert planned["wrong"] == ["✕ 768:1152"]
    assert (one["bars"], planned["bars"]) == (0, 1)  # the FFN columns of rank 2


@needs_chromium
def test_the_verdict_of_a_wrong_plan_is_there_once(drive):
    data = plan_data()
    (page,) = drive("return { shown: page.body.innerText, problems: count('#problems li') };", data)
    assert page["shown"].count(data["verdict"]) == 1
    assert page["shown"].count("ffn 770 to 1152") == 1
    assert page["problems"] == 1
