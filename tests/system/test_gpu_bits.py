"""`bits` on GPUs: the runs of a prompt, on the explicit and on the fused path."""

import pytest
from on_gpu import model_on_gpu, run_on_gpus
from tiny import write_tiny

from minitp import ops
from minitp.bits.run import bits_of_model
from minitp.loading.source import open_model

pytestmark = pytest.mark.usefixtures("cupy")


@pytest.mark.parametrize("path", ["explicit", "fused"])
def test_runs_on_gpus(path, tmp_path):
    directory = write_tiny(tmp_path / "model")
    source = open_model(str(directory), 2)

    def rank(comm):
        model = model_on_gpu(directory, comm, "float16", path=path)
        return bits_of_model(source, model, [1, 2, 3, 4, 5], 3, 1)

    rows = run_on_gpus(2, rank)[0]
    assert rows[0].outcome == "same"
    assert len(rows) == 5
    assert {row.outcome for row in rows} <= {"same", "rounding"}


def test_a_change_on_gpus_is_found_in_its_block(monkeypatch, tmp_path):
    directory, original = write_tiny(tmp_path / "model"), ops.row_parallel
    source = open_model(str(directory), 2)

    def by_rows(xp, x, w):
        y = original(xp, x, w)
        return y * xp.float16(1.001) if len(x) == 15 else y

    monkeypatch.setattr(ops, "row_parallel", by_rows)

    def rank(comm):
        return bits_of_model(source, model_on_gpu(directory, comm, path="explicit"), [1, 2, 3, 4, 5], 3, 1)

    rows = run_on_gpus(2, rank)[0]
    assert [row.outcome for row in rows] == ["same", "rounding", "same", "same", "same"]
    assert rows[1].step == "batch/layers.0.attn.out_partial"
    assert rows[1].why[1].startswith("confirmed")
    assert rows[1].why[2].endswith("in mlp.out_partial")
