"""Replicas as processes: they start, serve, die and restart separately, or share the world of an mpirun."""

import json
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest
from doc_commands import blocks, commands
from paths import DOCS
from running import END_S, START_S, WORKER, Running, faulty, under_launcher, under_mpirun
from served import Served, metric, write_chatty

from minitp.cli.arguments import parser

pytestmark = pytest.mark.mpi
PAGE = (DOCS / "serving.md").read_text(encoding="utf-8")
SHORT = {"model": "long", "max_tokens": 3, "temperature": 0}
LONG = {"model": "long", "prompt": "Hello", "max_tokens": 50_000, "extra_body": {"ignore_eos": True}}
SCRIPT = """
import sys
from minitp import LLM, SamplingParams

with LLM(sys.argv[1], tp=int(sys.argv[2]), replicas=2, cache_tokens=4096) as llm:
    print(llm)
    for completion in llm.generate([[n, 2, 3] for n in range(6)], max_new_tokens=8):
        print(completion.token_ids)
    print([(one["replica"], one["rank"]) for one in llm.ranks])
    print("running", flush=True)
    if len(sys.argv) > 3:
        for _ in llm.stream([1, 2], max_new_tokens=4000, ignore_eos=True):
            pass
"""


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """Write a model that can generate for minutes."""
    directory = tmp_path_factory.mktemp("models") / "long"
    return write_chatty(directory, max_position_embeddings=200_000)


def wait_until(condition, seconds=END_S):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def serve(model, tp, *options):
    return Served(model, "--tp", tp, "--replicas", 2, "--cache-tokens", 400_000, *options)


def pids_of(served, replica):
    """Return the pids of the ranks of a replica."""
    found = []
    for pid, command in served.processes().items():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if f"MINITP_REPLICA={replica}/2".encode() in environment and re.match(r"\S*python", command):
            found.append(pid)
    return found


def begin(served):
    """Open a stream and wait for its first chunk."""
    stream = served.client().completions.create(**LONG, stream=True)
    next(iter(stream))
    return stream


def health(served):
    answer = httpx.get(f"{served.url}/health")
    return answer.status_code, answer.json()


def of_replicas(served, name):
    """Return the values of a metric with the label `replica`."""
    lines = httpx.get(f"{served.url}/metrics").text.splitlines()
    return [float(line.split()[1]) for line in lines if line.startswith(f"{name}{{replica=")]


def test_the_commands_on_the_page_are_valid():
    block = next(block for block in blocks("serving") if "--replicas" in block)
    for command, _ in commands(block):
        words = shlex.split(command, comments=True)
        assert words[0] == "minitp"
        assert parser().parse_args(words[1:]).replicas == 2


def ready(count):
    return 200, {"status": "ok", "replicas": 2, "replicas_ready": count}


def test_a_dead_replica_is_restarted_while_the_other_serves(long):
    served = serve(long, 2, "--restart")
    assert "on 2 replicas of 2 ranks, float32" in served.lines[0]
    assert " tokens each);" in served.lines[0], "the cache of each replica"
    assert health(served) == ready(2)
    streams = [begin(served), begin(served)]
    assert of_replicas(served, "minitp_replica_sequences_running") == [1, 1]
    assert metric(served, "minitp_sequences_running") == 2
    ranks = httpx.get(f"{served.url}/ranks").json()
    assert [(one["replica"], one["rank"]) for one in ranks["ranks"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    metrics = httpx.get(f"{served.url}/metrics").text
    assert set(re.findall(r"minitp_replica_\w+", metrics)) == set(re.findall(r"minitp_replica_\w+", PAGE))
    assert 'minitp_rank_busy_seconds_total{rank="1",replica="1"}' in metrics
    os.kill(pids_of(served, 1)[1], signal.SIGKILL)
    with pytest.raises(openai.APIError, match=r"replica 1: rank \d \(pid \d+\) died"):
        list(streams[1])
    next(iter(streams[0]))  # the other one goes on
    assert health(served)[0] == 200
    assert served.client().completions.create(**SHORT, prompt="Hi").choices[0].text
    wait_until(lambda: health(served) == ready(2), START_S)
    assert metric(served, "minitp_rank_restarts_total") == 1
    assert of_replicas(served, "minitp_replica_ready") == [1, 1]
    next(iter(streams[0]))
    later = begin(served)  # goes to the new ranks, which have nothing to do
    assert of_replicas(served, "minitp_replica_sequences_running") == [1, 1]
    for stream in (streams[0], later):
        stream.close()
    served.stop()
    said = [line for line in served.lines[1:] if "SIGTERM" not in line and line.startswith("minitp: ")]
    assert re.match(r"minitp: replica 1: rank \d \(pid \d+\) died", said[0])
    assert said[1:3] == ["minitp: replicas that accept requests: 1 of 2\n", "minitp: restarted: replica 1\n"]


def test_the_server_ends_with_its_last_replica(long):
    served = serve(long, 1)
    os.kill(pids_of(served, 0)[0], signal.SIGKILL)
    wait_until(lambda: health(served) == ready(1))
    assert served.client().completions.create(**SHORT, prompt="Hi").choices[0].text
    os.kill(pids_of(served, 1)[0], signal.SIGKILL)
    wait_until(lambda: health(served)[0] == 503)
    assert served.end_within(END_S) == 3


def script(model, tp, *more):
    return Running([sys.executable, "-c", SCRIPT, model, tp, *more])


def test_the_same_with_mpirun_and_without(tiny):
    code, out, err = script(tiny, 2).end(START_S)
    assert (code, err) == (0, "")
    assert "2 replicas of 2 ranks" in out
    assert "[(0, 0), (0, 1), (1, 0), (1, 1)]" in out
    worker = [sys.executable, "-c", SCRIPT, tiny, 2]
    assert under_mpirun([], 4, worker).end(START_S) == (0, out, "")
    code, of_one_rank, err = under_mpirun([], 2, [sys.executable, "-c", SCRIPT, tiny, 1]).end(START_S)
    assert (code, err) == (0, "")
    assert of_one_rank.splitlines()[1:7] == out.splitlines()[1:7], "the same tokens"


def test_ctrl_c_leaves_no_process(long):
    running = script(long, 2, "endless")
    out = b""
    while b"running\n" not in out:
        out += os.read(running.process.stdout.fileno(), 1 << 16)
    os.killpg(running.process.pid, signal.SIGINT)
    code, _, err = running.end(END_S)
    assert code == -signal.SIGINT
    assert err.endswith("\nKeyboardInterrupt\n")


def test_a_world_that_is_no_multiple_of_the_replicas(tiny):
    argv = ["check", "Hello", "--model", tiny, "--replicas", 2]
    code, out, err = under_mpirun(argv, 3).end(START_S)
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "minitp: --replicas 2, but MPI started 3 ranks, which cannot be divided into 2 equal groups; start a "
        "multiple of 2"
    ]
    worker = [*WORKER, "serve", "--model", tiny, "--replicas", 2, "--tp", 1, "--port", 0]
    code, out, err = under_mpirun([], 3, worker).end(START_S)
    assert (code, out) == (2, "")
    assert err == "minitp: --tp 1 --replicas 2 need 2 ranks, but MPI started 3 ranks; omit --tp\n"


def test_check_compares_the_replicas(tiny):
    argv = ["check", "Hello", "--model", tiny, "--replicas", 2]
    code, out, err = under_launcher(argv, 2).end(START_S)
    assert (code, err) == (0, "")
    assert re.search(r"\nall steps within bounds .* on 2 ranks\); 2 replicas with the same bits\n$", out)
    assert out.count("within bounds") == 1


def test_faults_in_one_group(tiny):
    argv = ["check", "Hello", "--model", tiny, "--replicas", 2]
    code, out, err = under_launcher(argv, 2, **faulty("spoil loading 3")).end(START_S)
    assert code == 1
    assert re.search(r"\nreplica 1: first wrong step: weights/model\.\S+, .*rank 1: [^\n]*\n$", out)
    code, _, err = under_launcher(argv, 2, **faulty("raise forward 3")).end(START_S)
    assert code == 3
    assert err.startswith("minitp: rank 3 failed: ")


def test_bench_divides_the_requests(tiny):
    argv = ["bench", "--requests", 3, "--replicas", 2, "--model", tiny, "-n", 4, "--prompt-tokens", 8]
    code, out, err = under_launcher([*argv, "--rounds", 1, "--json"], 1).end(START_S)
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert (result["tp"], result["replicas"], result["requests"]["count"]) == (1, 2, 3)
    assert len(result["weight_bytes_per_rank"]) == 2
