"""Tests of docs/serving.md: its examples, and its tables of options and metrics."""

import json
import re
import shlex
import subprocess
import sys

import httpx
import pytest
from paths import DOCS
from served import Served

from minitp.cli.arguments import parser
from minitp.loading.demo import demo_directory

pytestmark = pytest.mark.mpi
PAGE = (DOCS / "serving.md").read_text(encoding="utf-8")
# test_clients runs the examples between these two.
WITH_OPENAI, *_, WITH_LLM = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def server():
    demo_directory()
    served = Served("smollm2", "--tp", 2)
    yield served
    served.stop()


def output_of(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_openai_example(server):
    example = WITH_OPENAI.replace("http://127.0.0.1:8000", server.url)
    assert example != WITH_OPENAI
    first, rest = output_of(sys.executable, "-c", example).split("\n", 1)
    assert f"print(answer.choices[0].message.content)  # {first}\n" in WITH_OPENAI
    assert len(rest) > 30


def test_the_curl_examples(server):
    examples = re.findall(r"\$ (curl .*?)\n```", PAGE.replace("http://127.0.0.1:8000", server.url), re.DOTALL)
    streamed, prefilled = (output_of(*shlex.split(one.replace("\\\n", ""))) for one in examples)
    assert '"text": " Paris"' in streamed
    assert streamed.endswith("data: [DONE]\n\n")
    assert json.loads(prefilled)["choices"][0]["message"]["content"].startswith(" ")


def test_the_llm_example():
    out = output_of(sys.executable, "-c", WITH_LLM)
    assert out.startswith(" Paris.\n")
    assert "\nThe capital of France is Paris.\n[" in out


def test_options_and_defaults_agree_with_the_command():
    defaults = vars(parser().parse_args(["serve"]))
    rows = re.findall(r"^\| `--([a-z-]+)` \| ([^|]*) \|", PAGE, re.MULTILINE)
    assert len(rows) == 8
    for option, default in rows:
        real = defaults[option.replace("-", "_")]
        if real is not None:
            assert default.strip("` ") == (f"{real:g}" if isinstance(real, float) else str(real)), option


def test_metrics_agree_with_the_server(server):
    httpx.post(f"{server.url}/v1/completions", json={"model": "smollm2", "prompt": "Hi", "max_tokens": 2})
    documented = re.findall(
        r"`([a-z_]+)(?:\{.*?\})?`", PAGE.split("## Monitoring")[1].split("What to look")[0]
    )
    found = re.findall(r"^# TYPE (\S+)", httpx.get(f"{server.url}/metrics").text, re.MULTILINE)
    real = {name for name in found if not name.endswith("_created")}
    assert {f"minitp_{name}" for name in documented if not name.endswith("_")} == real
