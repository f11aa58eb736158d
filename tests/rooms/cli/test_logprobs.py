"""Tests of `minitp logprobs`: numbers of the ranks and of the oracle, and the errors of other engines."""

import json

import numpy as np
import pytest
from refusal import check_refusal
from tiny import write_tiny

from minitp.cli.likelihood import CHUNK, log_likelihoods, oracle_log_likelihoods
from minitp.cli.main import main
from minitp.comm import run_threads
from minitp.device import open_device
from minitp.load import load_model
from minitp.loading.source import open_model
from minitp.oracle import Oracle

PROMPT, TOKENS = [72, 101, 108], [108, 111, 33, 7]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny")


def plain(directory, ids):
    """Return the log-likelihood of each token but the first, one softmax at a time."""
    logits = Oracle.from_directory(directory).logits(ids)  # [T, V]
    return [row[token] - np.log(np.exp(row).sum()) for row, token in zip(logits, ids[1:], strict=False)]


@pytest.fixture
def run(tiny, tmp_path, capsys):
    """A function that writes lines and runs the command on them; it returns (exit code, stdout, stderr)."""

    def run(lines, *argv):
        path = tmp_path / "lines.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("\n".join(texts), encoding="utf-8")
        code = main(["logprobs", str(path), "--model", str(tiny), "--tp", "1", *argv])
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("tp", [1, 3])
def test_log_likelihoods_on_ranks_are_the_oracles(tiny, tp):
    ids = np.random.default_rng(0).integers(0, 256, CHUNK + 40).tolist()
    source = open_model(str(tiny), tp)
    found = run_threads(
        tp, lambda comm: log_likelihoods(load_model(source, comm, open_device("float32")), ids)
    )
    expected = plain(tiny, ids)
    for one in found:
        np.testing.assert_allclose(one, expected, atol=1e-4)  # float32, logits of order 1
    np.testing.assert_allclose(oracle_log_likelihoods(Oracle.from_directory(tiny), ids), expected, atol=1e-12)


@pytest.mark.parametrize("argv", [(), ("--oracle",)], ids=["ranks", "oracle"])
def test_the_errors_of_each_field(run, tiny, argv):
    right = plain(tiny, PROMPT + TOKENS)[len(PROMPT) - 1 :]
    off = [0.5, 0.0, -0.25, 0.125]
    lines = [
        {
            "prompt_token_ids": PROMPT,
            "token_ids": TOKENS,
            "engine_logprobs": (np.array(right) - off).tolist(),
        },
        "",
        {
            "prompt_token_ids": PROMPT,
            "token_ids": TOKENS,
            "logprobs": [right[0] - 1, None, None, None],
            "text": 5,
        },
        {"token_ids": TOKENS},
    ]
    code, out, _ = run(lines, "--json", *argv)
    result = json.loads(out)
    assert (code, result["ok"], result["tolerance"]) == (0, True, None)
    first, second, third = result["lines"]
    assert [line["line"] for line in result["lines"]] == [1, 3, 4]
    assert first["logprobs"] == pytest.approx(right, abs=1e-4)
    assert first["log_likelihood"] == pytest.approx(sum(right), abs=1e-4)
    errors = first["fields"]["engine_logprobs"]
    assert errors["mean_error"] == pytest.approx(-0.09375, abs=1e-4)
    assert errors["mean_abs_error"] == pytest.approx(0.21875, abs=1e-4)
    assert errors["max_abs_error"] == pytest.approx(0.5, abs=1e-4)
    assert (errors["worst"]["line"], errors["worst"]["index"], errors["worst"]["token_id"]) == (
        1,
        0,
        TOKENS[0],
    )
    assert second["fields"]["logprobs"]["count"] == 1
    assert third["fields"] == {}
    assert third["logprobs"][0] is None
    assert third["logprobs"][1:] == pytest.approx(plain(tiny, TOKENS), abs=1e-4)
    assert {name: errors["count"] for name, errors in result["fields"].items()} == {
        "engine_logprobs": 4,
        "logprobs": 1,
    }
    assert result["fields"]["logprobs"]["worst"]["line"] == 3


@pytest.mark.parametrize(("tolerance", "code"), [("0.9", 1), ("1.1", 0)])
def test_the_exit_code_tells_whether_a_difference_exceeds_the_tolerance(run, tiny, tolerance, code):
    right = plain(tiny, TOKENS)
    line = {"token_ids": TOKENS, "logprobs": [None, right[0] - 1, *right[1:]]}
    found, out, _ = run([line], "--oracle", "--tolerance", tolerance)
    assert found == code
    assert "token 1 (id 111): " in out
    assert ("an error exceeds the tolerance, 0.9" in out) == (code == 1)


def test_text_without_fields_to_compare(run, tiny):
    code, out, _ = run([{"token_ids": TOKENS}, {"token_ids": [5]}, {"token_ids": [5], "logprobs": [None]}])
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == f"{tiny}, computed by minitp, float32"
    assert lines[3].split()[:3] == ["1", "4", f"{sum(plain(tiny, TOKENS)):.3f}"]
    assert lines[-1] == "logprobs: 0 tokens, mean error -, mean |error| -, max |error| -"
    code, out, _ = run([{"token_ids": TOKENS}])
    assert out.splitlines()[-1].startswith("4 tokens; the file has no field whose name ends in logprobs")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1: not JSON: "),
        ("[1]", "line 1: expected a JSON object with token_ids"),
        ({"token_ids": []}, "line 1: expected a JSON object with token_ids"),
        ({"token_ids": [1, True]}, "line 1: expected a JSON object with token_ids"),
        ({"token_ids": [1], "prompt_token_ids": "a"}, "line 1: prompt_token_ids 'a': expected a list"),
        ({"token_ids": [1, 999]}, "line 1: token id 999 is outside the vocabulary"),
        ({"token_ids": [1] * 513}, "line 1: 513 tokens exceed the model's context of 512"),
        (
            {"token_ids": [1, 2], "logprobs": [-1.0]},
            "line 1: logprobs has 1 number for 2 tokens in token_ids",
        ),
        (
            {"token_ids": [1, 2], "my_logprobs": [-1.0, 0.5]},
            "line 1: my_logprobs [-1.0, 0.5]: expected a list",
        ),
        ('{"token_ids": [1, 2], "logprobs": [null, NaN]}', "line 1: logprobs [None, nan]: expected a list"),
        ("", "the file is empty; give a JSON object"),
    ],
)
def test_a_malformed_line_is_rejected_by_its_number(run, line, words):
    code, out, err = run([line])
    check_refusal(code, out, err)
    assert words in err


def test_other_bad_input(run, tmp_path, capsys):
    code, out, err = run([{"token_ids": [1]}], "--tolerance", "-1")
    check_refusal(code, out, err)
    assert "--tolerance -1.0: expected 0 or a positive number" in err
    assert main(["logprobs", str(tmp_path / "missing.jsonl"), "--model", "smollm2", "--tp", "1"]) == 2
    assert "missing.jsonl" in capsys.readouterr().err
