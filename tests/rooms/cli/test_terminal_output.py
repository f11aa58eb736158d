"""The output that appears on a terminal but not in a pipe: the prompt of `generate`, and colors."""

import os
import pty
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

COMMAND = [sys.executable, "-m", "minitp"]
DIM, GREEN, RED, RESET = "\x1b[2m", "\x1b[32m", "\x1b[31m", "\x1b[0m"
WITH_COLOR = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"}


def on_terminal(*argv, **variables):
    """Run the command with a terminal as its stdout; return its output and exit code."""
    reader, writer = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *map(str, argv)], stdout=writer, stderr=subprocess.PIPE, env=WITH_COLOR | variables
    )
    os.close(writer)
    pieces = []
    try:
        while piece := os.read(reader, 65536):
            pieces.append(piece)
    except OSError:  # how Linux reports the end of a terminal
        pass
    finally:
        os.close(reader)
    _, errors = process.communicate(timeout=120)
    assert errors == b""
    return b"".join(pieces).decode().replace("\r\n", "\n"), process.returncode


def in_pipe(*argv):
    return subprocess.run([*COMMAND, *map(str, argv)], capture_output=True, env=WITH_COLOR).stdout.decode()


@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.mpi)])
def test_generate_shows_the_prompt_first(tiny, tp):
    argv = ["generate", "Once upon", "--model", tiny, "-n", 8, "--tp", tp]
    continuation = in_pipe(*argv)
    assert "Once upon" not in continuation
    assert on_terminal(*argv) == (f"{DIM}Once upon{RESET}{continuation}", 0)
    assert on_terminal(*argv, NO_COLOR="1") == (f"Once upon{continuation}", 0)
    assert on_terminal(*argv, NO_COLOR="")[0].startswith(DIM), "an empty NO_COLOR has no effect"
    assert on_terminal(*argv, TERM="dumb") == (f"Once upon{continuation}", 0)


def test_generate_shows_no_prompt_where_there_is_none(tiny):
    argv = ["generate", "--model", tiny, "-n", 2, "--tp", 1]
    assert on_terminal(*argv, "--tokens", "5,6")[0] == in_pipe(*argv, "--tokens", "5,6")
    assert on_terminal(*argv, "hi", "--json")[0].startswith("{")


def test_a_verdict_has_the_color_of_its_meaning(tiny, tmp_path):
    argv = ["check", "hi", "--model", tiny, "--tp", 1]
    verdict = in_pipe(*argv).splitlines()[-1]
    assert verdict.startswith("all steps within bounds")
    shown, code = on_terminal(*argv)
    assert (shown.splitlines()[-1], code) == (f"{GREEN}{verdict}{RESET}", 0)
    assert on_terminal(*argv, NO_COLOR="1")[0].splitlines()[-1] == verdict

    paths = tmp_path / "a.safetensors", tmp_path / "b.npz"
    in_pipe("trace", "hi", "--model", tiny, "--tp", 1, "-o", paths[0])
    tensors = load_file(paths[0])
    np.savez(paths[1], **tensors | {"prefill/logits": 2 * tensors["prefill/logits"]})
    shown, code = on_terminal("compare", *paths)
    assert code == 1
    assert shown.splitlines()[-1].startswith(f"{RED}first differing step: ")
    assert "\x1b" not in in_pipe("compare", *paths)
