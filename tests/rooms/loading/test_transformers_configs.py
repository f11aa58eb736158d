"""Tests of config.json against what transformers writes and computes (support/transformers_configs.json)."""

import numpy as np
import pytest
from tiny import CONFIG
from written_configs import KNOWN, NEWEST, WRITTEN

from minitp.loading.config import parse_config
from minitp.oracle import Oracle
from minitp.oracle import ops as oracle_ops
from minitp.rope import rope_inverse_frequencies


@pytest.mark.parametrize("written", WRITTEN, ids=" ".join)
def test_configs_with_every_default_are_read_completely(written):
    assert parse_config(WRITTEN[written], "here").unread == ()
    Oracle(WRITTEN[written], None)  # the oracle has its own reader


@pytest.mark.parametrize("family", NEWEST)
def test_absent_fields_have_the_defaults_of_transformers(family):
    fields, differing = NEWEST[family], []
    expected = parse_config(fields, "here")
    sizes = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
    for name in set(fields) - sizes - {"model_type"}:
        without = {key: value for key, value in fields.items() if key != name}
        differing += [name] if parse_config(without, "here") != expected else []
    assert differing in ([], ["eos_token_id"])  # without it, no token ends a text


@pytest.mark.parametrize("name", KNOWN["rope"])
def test_rope_is_that_of_transformers(name):
    row = KNOWN["rope"][name]
    fields = {**CONFIG, "num_key_value_heads": 8, "architectures": None, **row["fields"]}
    config = parse_config(fields, "here")
    expected = row["frequencies"]  # computed in float32
    found = rope_inverse_frequencies(config.rope, config.rotary_dim)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(oracle_ops.rope_inverse_frequencies(fields), expected, rtol=1e-6)
    assert config.rope.attention_factor == pytest.approx(row["attention_factor"], rel=1e-12)
    assert oracle_ops.attention_factor(fields) == pytest.approx(row["attention_factor"], rel=1e-12)
    unknown = {"yarn with attn_factor": "attn_factor", "yarn with finetuned": "finetuned"}
    unknown["linear with the field of another type"] = "beta_fast"
    assert config.unread == ((f"rope_scaling.{unknown[name]}",) if row["warned"] else ())
    assert row["warned"] == (name in unknown)
