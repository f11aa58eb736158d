"""A check of the demo model on real ranks, as the README shows it."""

import re
import subprocess
import sys

import pytest


@pytest.mark.mpi
def test_the_demo_model_on_four_ranks():
    command = [sys.executable, "-m", "minitp", "check", "The capital of France is", "--tp", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert lines[0].startswith(
        "smollm2 on 4 ranks, float32: a prompt of 5 tokens and 2 decoded ones, 30 layers"
    )
    # 273 tensors less the tied lm_head on each rank; 4 + 30 * 21 + 3 steps in each of five
    # passes, of which one has no logits.
    arrays = 4 * (272 + 5 * 637 - 3)
    assert lines[-1] == f"all steps within bounds for all 30 layers ({arrays} arrays on 4 ranks)"
    assert re.fullmatch(r"checked in [\d.]+ s, [\d.]+ s per layer", lines[-2])
    named = {line.split("  ")[0] for line in lines[3 : lines.index("", 3)]}
    assert {"weights", "tokens", "attn.scores", "attn.k_cache", "mlp.act", "logits"} <= named
    assert len(named) == 1 + 28
    assert lines[-4] == "30 layers: at most 80% of the error allowed; -v shows a row for each"
