"""`minitp check` and `minitp trace` as a user runs them: real ranks, their output, exit codes, bad input."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from paths import FAULTY_WORKER
from safetensors import safe_open
from tiny import UNEVEN, write_tiny

from minitp.cli.check import table
from minitp.cli.main import main

COMMAND = [sys.executable, "-m", "minitp"]
FAULTY_COMMAND = [  # the command with faulty ranks
    sys.executable,
    "-c",
    f"import sys\nfrom minitp.cli.main import main\nsys.exit(main(sys.argv[1:], worker={FAULTY_WORKER!r}))",
]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A model of nine query heads on three KV heads."""
    return write_tiny(tmp_path_factory.mktemp("models") / "uneven", **UNEVEN | {"vocab_size": 258})


def run(*argv, command=COMMAND, **variables):
    done = subprocess.run(
        [*command, *map(str, argv)],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        timeout=240,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.mpi
def test_verbose_has_a_row_for_each_layer(tiny):
    code, out, err = run("check", "hello", "--model", tiny, "--tp", 2, "-v")
    assert (code, err) == (0, ""), err
    assert [line.split("  ")[0] for line in out.splitlines()[-5:-3]] == ["layer 0", "layer 1"]
    assert "-v shows" not in out


def test_layers_near_their_bounds_always_have_a_row():
    worst = [0.2, 0.81, 0.5]
    findings = [
        SimpleNamespace(
            pass_name="prefill", step="attn.q", layer=i, rank=0, name=f"layers.{i}", ratio=ratio,
            bounds=(1e-6, 0), local=None, total=None, total_bound=None,
        )
        for i, ratio in enumerate(worst)
    ]  # fmt: skip
    result = SimpleNamespace(problems=[], blamed=list, findings=findings)
    text = "\n".join(table(result, every_layer=False))
    assert "layer 1 " in text
    assert "layer 0 " not in text
    assert text.endswith("the other 2 layers: at most 80% of the error allowed; -v shows a row for each")
    text = "\n".join(table(result, every_layer=True))
    assert all(f"layer {i} " in text for i in range(3))
    assert "-v" not in text


@pytest.mark.mpi
@pytest.mark.parametrize(("tp", "dtype"), [(1, "float32"), (4, "float32"), (9, "bfloat16"), (4, "float16")])
def test_any_number_of_ranks(uneven, tp, dtype):
    code, out, err = run("check", "hello", "--model", uneven, "--tp", tp, "--dtype", dtype)
    assert (code, err) == (0, ""), out + err
    assert out.splitlines()[-1].startswith("all steps within bounds for all 2 layers (")


@pytest.mark.mpi
def test_a_wrong_rank_is_named_and_the_exit_code_is_1(uneven, tmp_path):
    page = tmp_path / "page.html"
    arguments = ["check", "hello", "--model", uneven, "--tp", 4, "--report", page]
    code, out, err = run(*arguments, command=FAULTY_COMMAND, MINITP_TEST_FAULT="spoil loading 2")
    assert (code, err) == (1, ""), err
    blame = "first wrong step: weights/model.layers.1.mlp.down_proj.weight, layer 1, rank 2: relative error "
    *_, report, verdict = out.splitlines()
    assert verdict.startswith(blame)
    assert verdict.endswith("it must be exact")
    assert report == f"report: {page}"
    assert "weights/model.layers.1.mlp.down_proj.weight, layer 1, rank 2" in page.read_text()
    wrong = [line for line in out.splitlines() if line.startswith(("weights/", "prefill/", "decode."))]
    assert len(wrong) == 1, out  # no later step is blamed


@pytest.mark.mpi
def test_a_trace_from_four_ranks_and_from_the_oracle(uneven, tmp_path):
    mine, exact = tmp_path / "mine.safetensors", tmp_path / "exact.safetensors"
    code, out, err = run("trace", "hello", "--model", uneven, "--tp", 4, "-o", mine, "--decode", 1)
    assert (code, err) == (0, "")
    assert out.startswith(f"{mine}: 6 tokens through {uneven} on 4 ranks, ")
    code, out, err = run("trace", "hello", "--model", uneven, "-o", exact, "--decode", 1, "--oracle")
    assert (code, err) == (0, "")
    assert "on the oracle, float64" in out
    with safe_open(mine, framework="np") as a, safe_open(exact, framework="np") as b:
        ours, theirs = set(a.keys()), set(b.keys())
        sums = ("out_partial", "embed_partial", "logits_partial")  # the oracle has none
        assert all(name.endswith(sums) for name in ours - theirs)
        assert not theirs - ours
        assert a.metadata()["token_ids"] == b.metadata()["token_ids"]
        assert json.loads(a.metadata()["passes"]) == [["prefill", 0, 5], ["decode.1", 5, 6]]


@pytest.mark.mpi
def test_batches_over_a_cache_of_int8(uneven):
    code, out, err = run("check", "hello", "--model", uneven, "--tp", 2, "--batch", 2, "--kv-dtype", "int8")
    assert (code, err) == (0, ""), out + err
    assert "float32, a cache of int8: a prompt of 5 tokens and 2 decoded ones, 2 sequences in batches" in out
    assert "\nblock_table " in out


@pytest.mark.mpi
def test_a_prompt_of_random_tokens(uneven):
    code, out, err = run("check", "--prompt-tokens", 40, "--model", uneven, "--tp", 2, "--decode", 0)
    assert (code, err) == (0, ""), out + err
    assert "a prompt of 40 tokens and 0 decoded ones" in out


# --- bad input ------------------------------------------------------------------------------------------


BAD = {
    "neither prompt nor tokens": ([], "needs a PROMPT or --tokens 1,2,3, and not both"),
    "both": (["a", "--tokens", "1"], "needs a PROMPT or --tokens 1,2,3, and not both"),
    "empty": ([""], "the prompt is empty"),
    "no such token": (["--tokens", "1,258"], "token id 258 is outside the vocabulary, 0 to 257"),
    "negative --decode": (["a", "--decode", "-1"], "--decode -1: expected 0 or more"),
    "too long": (["a" * 511, "--decode", "2"], "511 tokens and --decode 2 exceed the model's context of 512"),
}


@pytest.mark.parametrize("command", ["check", "trace"])
@pytest.mark.parametrize(("argv", "message"), BAD.values(), ids=BAD)
def test_bad_prompts_and_passes(refused, tiny, tmp_path, command, argv, message):
    output = ["-o", tmp_path / "a.safetensors"] if command == "trace" else []
    assert message in refused(command, *argv, "--model", tiny, *output)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a", "--prompt-tokens", "5"], "only one of them"),
        (["--prompt-tokens", "0"], "--prompt-tokens 0: expected 1 or more"),
        (["a", "--batch", "1"], "--batch 1: expected 0, or 2 to 64 sequences"),
        (["a" * 500, "--batch", "9"], "--batch 9: its longest sequence has 514 tokens, which exceeds the"),
    ],
)
def test_bad_options_of_check(refused, tiny, argv, message):
    assert message in refused("check", *argv, "--model", tiny)


@pytest.mark.parametrize(
    ("option", "name"), [("-o", "a.npz"), ("-o", "a.safetensors"), ("--report", "a.txt")]
)
def test_a_file_that_cannot_be_written(refused, tiny, tmp_path, option, name):
    command = "trace" if option == "-o" else "check"
    path = tmp_path / "nowhere" / name
    assert f"minitp: {path}: " in refused(command, "a", "--model", tiny, option, path)


def test_a_directory_in_the_files_place(refused, tiny, tmp_path):
    path = tmp_path / "there.safetensors"
    path.mkdir()
    assert f"{path}: cannot be written (it is a directory); " in refused(
        "trace", "a", "--model", tiny, "-o", path
    )


def test_steps_that_match_nothing(refused, tiny, tmp_path):
    path = tmp_path / "a.safetensors"
    said = refused("trace", "a", "--model", tiny, "-o", path, "--steps", "prefill/layers.2.*")
    assert "--steps 'prefill/layers.2.*': this run has no such step" in said


@pytest.mark.parametrize("glob", ["weights/*", "*_partial"])
def test_the_oracle_has_not_all_steps(refused, tiny, tmp_path, glob):
    path = tmp_path / "a.safetensors"
    said = refused("trace", "a", "--model", tiny, "-o", path, "--oracle", "--steps", glob)
    assert f"--steps {glob!r}: the oracle has no such step" in said


@pytest.mark.mpi
def test_traces_of_fewer_layers_are_compared_as_far_as_they_go(tiny, tmp_path):
    short, long = tmp_path / "short.safetensors", tmp_path / "long.safetensors"
    for path, layers in ((short, 1), (long, 2)):
        code, _, err = run("trace", "hi", "--model", tiny, "--tp", 1, "-o", path, "--layers", layers)
        assert (code, err) == (0, "")
    code, out, _ = run("compare", short, long)
    assert code == 0
    assert (
        "final_norm, logits_partial, logits are not compared: the number of layers is 1 in A and 2 in B"
        in out
    )


def test_the_oracle_runs_in_one_process(tiny, tmp_path, monkeypatch):
    def no_ranks(*_, **__):
        raise AssertionError("ranks were started")

    monkeypatch.setattr("minitp.cli.command.run_ranks", no_ranks)
    argv = ["trace", "a", "--model", str(tiny), "--tp", "4", "-o", str(tmp_path / "a.safetensors")]
    assert main([*argv, "--oracle"]) == 0
    with pytest.raises(AssertionError, match="ranks were started"):
        main(argv)


def test_the_oracle_has_no_ranks(refused, tiny, tmp_path):
    path = tmp_path / "a.safetensors"
    assert "--oracle and --per-rank" in refused(
        "trace", "a", "--model", tiny, "-o", path, "--oracle", "--per-rank"
    )


def test_a_full_disk(tiny, tmp_path):
    limit = ["bash", "-c", 'ulimit -f 8; trap "" XFSZ; exec "$@"', "-"]  # files of 8 kB at most
    path = tmp_path / "a.safetensors"
    code, out, err = run("trace", "hello", "--model", tiny, "--tp", 1, "-o", path, command=[*limit, *COMMAND])
    assert (code, out) == (3, "")
    assert err == "minitp: rank 0 failed: OSError: [Errno 27] File too large\n"
    assert not list(tmp_path.iterdir()), "a part of a trace is left"
