"""`minitp bits` on real ranks: one launch with all runs, and one for each number of ranks."""

import pytest
from running import START_S, under_launcher, under_mpirun
from tiny import write_tiny


@pytest.mark.mpi
def test_the_runs_on_one_to_three_ranks(tmp_path):
    model = write_tiny(tmp_path / "model", tokenizer=False)
    argv = ["bits", "--tokens", "1,2,3,4,5", "--model", model, "--batch", "2", "--repeats", "1"]
    code, out, err = under_launcher(argv, ranks=3).end(START_S)
    assert err == ""
    lines = out.splitlines()
    assert lines[0].startswith(f"{model} on 3 ranks, float32: 5 tokens, 2 layers; ")
    assert [line.split("  ")[0] for line in lines[3:10]] == [
        "the same run again",
        "in a batch of 2 sequences",
        "in two chunks",
        "one token per pass",
        "one token per pass, in a batch of 2",
        "on 2 ranks",
        "on 1 rank",
    ]
    assert lines[3].endswith("  same")
    changed = [line for line in lines[3:10] if "  changed  " in line]
    assert code == (1 if changed else 0)
    if changed:
        assert lines[-1] == f"bits change in {len(changed)} of 7 runs, by rounding only"


@pytest.mark.mpi
def test_under_mpirun_there_is_one_number_of_ranks(tmp_path):
    model = write_tiny(tmp_path / "model", tokenizer=False)
    argv = ["bits", "--tokens", "1,2,3", "--model", str(model), "--batch", "1", "--repeats", "1"]
    _, out, _ = under_mpirun(argv, ranks=2).end(START_S)
    assert [line.split("  ")[0] for line in out.splitlines()[3:6]] == [
        "the same run again",
        "in two chunks",
        "one token per pass",
    ]
