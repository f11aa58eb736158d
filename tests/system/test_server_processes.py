"""The server as a process: clients that disconnect, a full queue, ranks that die, signals."""

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
from served import Served, metric, write_chatty

from minitp.launch import supervisor

pytestmark = pytest.mark.mpi
LONG = {"model": "long", "prompt": "Hello", "max_tokens": 50_000, "extra_body": {"ignore_eos": True}}
SHORT = {"model": "long", "prompt": "Hello", "max_tokens": 3}
IMPATIENT = [
    sys.executable,
    "-c",
    "import sys\n"
    "from minitp.cli.main import main\n"
    "from minitp.launch import heartbeat\n"
    "heartbeat.STILL_LIMIT_S = 4\n"
    "sys.exit(main())",
]


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """Write a model that can generate for minutes."""
    directory = tmp_path_factory.mktemp("models") / "long"
    return write_chatty(directory, max_position_embeddings=200_000)


def start(model, *options, **more):
    return Served(model, "--tp", 2, "--cache-tokens", 400_000, *options, **more)


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def blocks_in_use(served):
    return metric(served, "minitp_cache_blocks_in_use")


def pid_of_rank(served, rank):
    """Return the pid of a rank, found by the variables that mpirun has set."""
    for pid, command in served.processes().items():
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        if "minitp ranks" in command and re.search(rb"\0PMI_RANK=%d\0" % rank, environment):
            return pid
    raise AssertionError(served.processes())


def begin(served, **more):
    """Open a stream and wait for its first chunk."""
    stream = served.client().completions.create(**LONG | more, stream=True)
    next(iter(stream))
    return stream


def raw_request(served, fields, missing=0):
    """Send a request without its last `missing` bytes; return the connection."""
    url, body = httpx.URL(served.url), json.dumps(fields).encode()
    connection = socket.create_connection((url.host, url.port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n"
    connection.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body))
    connection.sendall(body[: len(body) - missing])
    return connection


# --- clients -----------------------------------------------------------------------------------------------


def test_blocks_are_freed_when_a_client_disconnects(long):
    served = start(long)
    stream = begin(served)
    assert blocks_in_use(served) > 0
    stream.close()
    wait_until(lambda: blocks_in_use(served) == 0, 5)

    with pytest.raises(openai.APITimeoutError):  # a request without a stream whose client gives up
        served.client(timeout=1).completions.create(**LONG)
    wait_until(lambda: metric(served, "minitp_sequences_running") == blocks_in_use(served) == 0, 5)
    disconnected = re.findall(
        r'minitp_requests_total\{.*status="499"\} (\S+)', httpx.get(f"{served.url}/metrics").text
    )
    assert disconnected == ["2.0"]
    served.stop()


def test_a_client_that_leaves_in_the_middle_of_its_body_is_counted(long):
    served = start(long)
    raw_request(served, SHORT, missing=10).close()
    counted = 'minitp_requests_total{route="/v1/completions",status="499"} 1.0'
    wait_until(lambda: counted in httpx.get(f"{served.url}/metrics").text)
    served.stop()
    assert served.lines[1:] == ["minitp: SIGTERM: shutting down\n"]


def test_a_full_queue_rejects_requests(long):
    served = start(long, "--max-sequences", 1, "--max-queue", 1)
    streams = [begin(served)]
    waiting = threading.Thread(target=lambda: begin(served, max_tokens=3).close())
    waiting.start()
    wait_until(lambda: metric(served, "minitp_sequences_waiting") == 1)
    with pytest.raises(openai.RateLimitError, match="the queue is full: 2 of at most 2 sequences") as caught:
        served.client().completions.create(**SHORT)
    assert int(caught.value.response.headers["retry-after"]) > 0
    with pytest.raises(openai.BadRequestError, match="asks for 3 sequences; this server allows 2"):
        served.client().completions.create(**SHORT, n=3)
    streams[0].close()
    waiting.join()
    wait_until(lambda: blocks_in_use(served) == 0)
    assert served.client().completions.create(**SHORT).choices[0].text
    served.stop()


def test_a_request_that_takes_too_long_is_ended(long):
    served = start(long, "--request-timeout", 1)
    with pytest.raises(openai.InternalServerError, match="not finished within 1 s") as caught:
        served.client().completions.create(**LONG)
    assert caught.value.status_code == 504
    pieces = served.client().completions.create(**LONG, stream=True)
    with pytest.raises(openai.APIError, match="not finished within 1 s"):
        list(pieces)
    wait_until(lambda: blocks_in_use(served) == 0)
    served.stop()


# --- shutdown ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_ends_the_server(long, number):
    served = start(long)
    stream = served.client().completions.create(**LONG | {"max_tokens": 400}, stream=True)
    first = next(iter(stream))
    served.process.send_signal(number)
    wait_until(lambda: httpx.get(f"{served.url}/health").status_code == 503)
    assert httpx.get(f"{served.url}/health").json() == {"status": "draining"}
    with pytest.raises(openai.InternalServerError, match="the server is shutting down") as caught:
        served.client().completions.create(**SHORT)
    assert caught.value.status_code == 503
    pieces = [first, *stream]
    assert pieces[-1].choices[0].finish_reason == "length", "a running request is finished"
    assert served.end_within(10) == 0
    said = f"minitp: {number.name}: finishing 1 request, up to 30 s; a second signal ends at once\n"
    assert served.lines[1:] == [said]


def test_draining_has_a_time_limit(long):
    served = start(long, "--drain-timeout", 1)
    stream = begin(served)
    served.process.terminate()
    with pytest.raises(openai.APIError, match="the server is shutting down"):
        list(stream)
    assert served.end_within(10) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_does_not_wait(long, number):
    """Send it while there are a stream and a request without one; a third one changes nothing."""
    served = start(long)
    stream = begin(served)
    whole = raw_request(served, SHORT | {"max_tokens": 50_000, "ignore_eos": True})
    wait_until(lambda: metric(served, "minitp_sequences_running") == 2)
    for _ in range(3):
        served.process.send_signal(number)
        time.sleep(0.1)
    assert served.end_within(5) == 0
    assert len(served.lines) == 2, served.lines
    whole.close()
    stream.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_dead_rank_ends_the_streams_and_the_server(long, rank):
    served = start(long)
    stream = begin(served)
    died = time.monotonic()
    os.kill(pid_of_rank(served, rank), signal.SIGKILL)
    with pytest.raises(openai.APIError, match=rf"rank {rank} .*died"):
        list(stream)
    assert httpx.get(f"{served.url}/health").status_code == 503
    with pytest.raises(openai.InternalServerError, match="the model has failed"):
        served.client().completions.create(**SHORT)
    assert served.end_within(10) == 3
    assert time.monotonic() - died < 10
    assert sum(f"minitp: rank {rank} (pid " in line for line in served.lines) == 1


def test_restart_starts_the_ranks_again(long):
    served = start(long, "--restart")
    expected = served.client().completions.create(**SHORT, temperature=0).choices[0].text
    for times in (1, 2):
        stream = begin(served)
        os.kill(pid_of_rank(served, 1), signal.SIGKILL)
        with pytest.raises(openai.APIError, match=r"rank 1 .*died"):
            list(stream)
        assert httpx.get(f"{served.url}/health").json() == {"status": "loading"}
        wait_until(lambda: httpx.get(f"{served.url}/health").status_code == 200, 20)
        assert served.client().completions.create(**SHORT, temperature=0).choices[0].text == expected
        assert metric(served, "minitp_rank_restarts_total") == times
        assert blocks_in_use(served) == 0
    served.stop()


def test_a_paused_rank_is_waited_for_and_a_stopped_one_is_restarted(long):
    """Pause rank 0 in the middle of a message larger than a socket's buffer, then stop rank 1 for good."""
    served = start(long, "--restart", command=IMPATIENT)
    rank_0 = pid_of_rank(served, 0)
    os.kill(rank_0, signal.SIGSTOP)
    large = raw_request(served, SHORT | {"prompt": [5] * 100_000})
    for _ in range(10):
        assert httpx.get(f"{served.url}/health", timeout=1).status_code == 200, "no rank blocks the server"
        time.sleep(0.1)
    os.kill(rank_0, signal.SIGCONT)
    large.close()
    assert served.client().completions.create(**SHORT).choices[0].text

    stream, rank_1 = begin(served), pid_of_rank(served, 1)
    os.kill(rank_1, signal.SIGSTOP)
    said = f"rank 1 (pid {rank_1}) has stood still for 4 s: its process is stopped (state T)"
    with pytest.raises(openai.APIError, match=re.escape(said)):
        list(stream)
    assert httpx.get(f"{served.url}/health").json() == {"status": "loading"}
    wait_until(lambda: httpx.get(f"{served.url}/health").status_code == 200, 20)
    assert served.client().completions.create(**SHORT).choices[0].text
    served.stop()
    assert f"minitp: {said}\n" in served.lines


def test_ranks_end_when_the_server_is_killed(long):
    served = start(long)
    begin(served)
    assert len(served.processes()) >= 4, "the server, mpirun, two ranks"
    served.process.kill()
    served.process.wait()
    served.check_nothing_is_left(within=10)


# --- startup -----------------------------------------------------------------------------------------------


def test_a_port_that_is_taken(long, refused):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"--port {port}: Address already in use" in refused("serve", "--model", long, "--port", port)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "99999"], "--port 99999"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--max-queue", "-1"], "--max-queue -1: expected 0 or more"),
        (["--request-timeout", "0"], "--request-timeout 0.0: expected 1 or more"),
        (["--max-sequences", "0"], "--max-sequences 0: expected at least 1"),
        (["--block-size", "0"], "--block-size 0: expected at least 1"),
        (["--cache-tokens", "3"], "--cache-tokens 3: expected at least 16, one block"),
        (["--max-context", "300000"], "--max-context 300000"),
        (["--model", "/no/such/model"], "--model /no/such/model"),
        (["--tp", "99"], "--tp 99"),
    ],
)
def test_wrong_options_are_rejected(long, options, words, refused):
    assert words in refused("serve", "--port", 0, "--model", long, *options)


def test_a_missing_package_is_named(long, refused, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("minitp.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'minitp[serve]'" in refused("serve", "--model", long)


def test_inside_mpirun(long):
    """Start the server with mpirun: rank 0 serves HTTP."""
    command = [supervisor.find_mpirun(), "-n", 2, sys.executable, "-m", "minitp"]
    served = Served(long, "--cache-tokens", 1600, command=command)
    assert served.client().completions.create(**SHORT).choices[0].text
    assert any("on 2 ranks" in line for line in served.lines)
    served.process.terminate()
    served.process.wait(10)
    served.check_nothing_is_left(within=5)
