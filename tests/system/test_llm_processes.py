"""Scripts that use `LLM`: the same results with and without mpirun, and no process left at any end."""

import os
import re
import select
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from running import END_S, FAULTY_WORKER, START_S, Running
from tiny import write_tiny

from minitp.comm.single import SingleRank
from minitp.device import open_device
from minitp.generate import generate
from minitp.launch import supervisor
from minitp.load import load_model
from minitp.loading.source import open_model
from minitp.request import Request
from minitp.sampling import SamplingParams

pytestmark = pytest.mark.mpi

BEGINNING = f"""
import gc, os, sys, threading, time
from minitp import LLM, SamplingParams
from minitp.launch.run import WORKER
if "MINITP_TEST_FAULT" in os.environ:
    WORKER[:] = {FAULTY_WORKER!r}
MODEL, LONG = sys.argv[1], SamplingParams(max_new_tokens=400_000, ignore_eos=True)

def start(tp=2, **options):
    return LLM(MODEL, **{{"tp": tp, "cache_tokens": 500_000, **options}})
"""
STARTED = []  # the Running of each script that the current test has started
IDLE_S = 3  # duration of the measurement
MOST_WHILE_IDLE = 0.02  # fraction of a core


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Write a model that can generate for minutes."""
    return write_tiny(tmp_path_factory.mktemp("models") / "model", max_position_embeddings=1_000_000)


def run(*command, **variables):
    STARTED.append(Running(command, **variables))
    return STARTED[-1]


def plain(script, model, *arguments, **variables):
    return run(sys.executable, "-c", BEGINNING + script, model, *arguments, **variables)


def under_mpirun(script, model, ranks=2):
    return run(supervisor.find_mpirun(), "-n", ranks, sys.executable, "-c", BEGINNING + script, model)


@pytest.fixture(autouse=True)
def _processes_end_with_the_test():
    yield
    while STARTED:
        STARTED.pop().kill_all()


STARTERS = pytest.mark.parametrize("started", [plain, under_mpirun])


def line_of(running):
    """Return the next line that the script prints."""
    descriptor, line = running.process.stdout.fileno(), b""
    while not line.endswith(b"\n"):
        assert select.select([descriptor], [], [], START_S)[0], "the script prints nothing"
        byte = os.read(descriptor, 1)
        assert byte, running.process.stderr.read().decode()
        line += byte
    return line.decode().rstrip("\n")


def ranks_of(running):
    """Return the pids of the ranks, which under mpirun are the scripts themselves."""
    processes = running.processes().items()
    return [pid for pid, line in processes if re.match(r"\S*python", line) and pid != running.process.pid]


def wait_until(condition):
    deadline = time.monotonic() + END_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def greedy(model, prompt, count):
    """Return the expected tokens, generated in this process."""
    source = open_model(str(model), 1)
    request = Request(SamplingParams(max_new_tokens=count), source.config.eos_token_ids, prompt, 512)
    return list(generate(load_model(source, SingleRank(), open_device("float32")), prompt, request))


# --- with mpirun and without ----------------------------------------------------------------------------


SAME = """
with start() as llm:
    for completion in llm.generate([[1, 2, 3], "Hello"], max_new_tokens=20):
        print(completion.token_ids, repr(completion.text), completion.finish_reason)
    for piece in llm.stream("Hello", temperature=1.0, seed=1, max_new_tokens=20):
        print(piece, end="|")
    print(llm.description["tp"], llm.load["blocks_in_use"])
    print([(one["rank"], one["query_heads"], one["comm_seconds"] >= 0) for one in llm.ranks])
print("the end")
"""


def test_a_script_prints_the_same_with_and_without_mpirun_once(model):
    code, out, err = plain(SAME, model).end(START_S)
    assert (code, err) == (0, "")
    assert out.startswith(f"{greedy(model, [1, 2, 3], 20)} ")
    holdings = "[(0, [0, 2], True), (1, [2, 4], True)]"
    assert out.endswith(f"|2 0\n{holdings}\nthe end\n")
    assert under_mpirun(SAME, model).end(START_S) == (0, out, "")


def test_a_completion_prints_the_same_with_and_without_mpirun(model):
    script = "print(start().generate([1, 2], max_new_tokens=3, logprobs=2))"
    expected = plain(script, model).end(START_S)
    assert expected[0] == 0
    assert under_mpirun(script, model).end(START_S) == expected


def test_unequal_ranks(model):
    script = """
with start(tp="auto", split=(5, 1)) as llm:
    print(llm.generate([1, 2, 3], max_new_tokens=20).token_ids)
    print(llm.description["split"], [one["query_heads"] for one in llm.ranks], llm.source.plan.head_ranges)
"""
    code, out, err = plain(script, model).end(START_S)
    assert (code, err) == (0, "")
    assert out == f"{greedy(model, [1, 2, 3], 20)}\n5,1 [[0, 3], [3, 4]] ((0, 3), (3, 4))\n"


def test_one_rank_under_mpirun(model):
    script = "print(start('auto').generate([1, 2, 3], max_new_tokens=9).token_ids)"
    assert under_mpirun(script, model, ranks=1).end(START_S) == (0, f"{greedy(model, [1, 2, 3], 9)}\n", "")


@pytest.mark.parametrize("script", ["with start() as llm: 1 / 0", "llm = start(); 1 / 0"])
def test_an_exception_in_the_script_of_rank_0_ends_all_ranks(model, script):
    code, out, err = under_mpirun(script, model).end(END_S)
    assert code == 1
    assert err.count("ZeroDivisionError: division by zero\n") == 1
    assert out == ""


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("LLM('/no/such/model')", "/no/such/model: no such directory"),
        ("start(cache_tokens=1)", "--cache-tokens 1: expected at least 16, one block"),
        ("start(nope=1)", "LLM has no parameter nope; its parameters are model, tp,"),
        ("start(tp=3)", "--tp 3, but MPI started 2 ranks"),
        ("start().generate('')", "the prompt is empty"),
    ],
)
def test_bad_input_under_mpirun_is_reported_once_and_ends_all_ranks(model, script, words):
    code, _, err = under_mpirun(script, model).end(END_S)
    assert code != 0
    assert err.count(f"InputError: {words}") + err.count(f"InputError: --model {words}") == 1


def test_a_second_llm_under_mpirun_works_or_is_rejected(model):
    script = (
        "for _ in range(2):\n    with start() as llm: print(llm.generate([1], max_new_tokens=3).token_ids)"
    )
    code, out, err = under_mpirun(script, model).end(END_S)
    expected = f"{greedy(model, [1], 3)}\n"
    assert (code, out) == (0, 2 * expected) or (out == expected and "minitp.errors." in err)


@STARTERS
def test_one_warning_for_an_unknown_config_field(tmp_path, started):
    model = write_tiny(tmp_path, new_scaling=2.0)
    code, out, err = started("with start(cache_tokens=64) as llm: print('ready')", model).end(START_S)
    assert (code, out) == (0, "ready\n")
    assert err.count("has a field 'new_scaling'") == err.count("\n") == 1


# --- ends -----------------------------------------------------------------------------------------------


@STARTERS
@pytest.mark.parametrize("last", ["", "next(llm.stream('Hi', LONG))", "sys.exit()", "del llm"])
def test_a_script_that_does_not_close_leaves_no_process(model, started, last):
    script = f"llm = start()\nprint(llm.generate([1, 2, 3], max_new_tokens=4).token_ids)\n{last}"
    assert started(script, model).end(START_S) == (0, f"{greedy(model, [1, 2, 3], 4)}\n", "")


GENERATING = "llm = start()\nprint(os.getpid(), flush=True)\nllm.generate(['Hello', 'Bye'], LONG)"
STARTING = "print(os.getpid(), flush=True)\nllm = start()\nprint('too late')"


IN_CHILD = """
llm = start()
expected = llm.generate([1, 2], max_new_tokens=9).token_ids
pieces = llm.stream("Hello", max_new_tokens=9, ignore_eos=True)
next(pieces)

def child(work):
    print(flush=True)
    if os.fork() == 0:
        work()
        os._exit(0) if ENDS == "os._exit" else sys.exit()
    os.wait()

def drop():
    del globals()["llm"], globals()["pieces"]
    gc.collect()

def use():
    for call in (lambda: llm.generate("Hello"), lambda: llm.stream("Hello").__next__()):
        try:
            call()
        except Exception as error:
            print(type(error).__name__, error, flush=True)

def leave():
    with llm:
        pass

def start_another():
    with start() as other:
        print(other.generate([1, 2], max_new_tokens=9).token_ids == expected, flush=True)
"""
CAN = "create another LLM here"


@pytest.mark.parametrize(
    ("started", "ends", "works", "says"),
    [
        (plain, "sys.exit", ["drop", "use", "leave", "gc.collect", "start_another"], "True"),
        (plain, "os._exit", ["drop", "multiprocessing.Process(target=print).run"], ""),
        (under_mpirun, "os._exit", ["drop", "use", "leave"], ""),  # MPI cannot exit in a forked child
    ],
)
def test_a_forked_child_leaves_the_ranks_alone(model, started, ends, works, says):
    calls = "".join(f"child({work})\n" for work in works)
    script = f"import multiprocessing\nENDS = {ends!r}\n{IN_CHILD}{calls}"
    script += "assert len(''.join(pieces)) > 0\n"
    script += "print(llm.generate([1, 2], max_new_tokens=9).token_ids == expected)"
    code, out, err = started(script, model).end(START_S)
    said = [line for line in out.split("\n") if line]
    assert (code, said[-1], err) == (0, "True", "")
    refusals = [line for line in said if line.startswith("InputError this process was forked from process ")]
    assert len(refusals) == 2 * ("use" in works)
    assert all(line.endswith(CAN) for line in refusals)
    assert said.count("True") == 1 + bool(says)


def test_ranks_end_with_their_script_although_a_forked_child_lives(model):
    running = plain("llm = start()\npid = os.fork()\nprint(pid, flush=True)\ntime.sleep(600)", model)
    child = max(int(line_of(running)), int(line_of(running)))
    os.kill(running.process.pid, signal.SIGKILL)
    wait_until(lambda: list(running.processes()) == [child])
    os.kill(child, signal.SIGKILL)
    check_all_end(running)


def test_ctrl_c_while_it_generates(model):
    running = plain(GENERATING, model)
    line_of(running)
    assert len(ranks_of(running)) == 2
    os.killpg(running.process.pid, signal.SIGINT)
    code, _, err = running.end(END_S)
    assert code == -signal.SIGINT
    assert err.endswith("\nKeyboardInterrupt\n")
    assert err.count("Traceback") == 1


def test_ctrl_c_while_it_starts(model):
    running = plain(STARTING, model, MINITP_TEST_FAULT="lag loading 1")
    line_of(running)
    wait_until(lambda: len(ranks_of(running)) == 2)
    os.killpg(running.process.pid, signal.SIGINT)
    code, out, err = running.end(END_S)
    assert (code, out) == (-signal.SIGINT, "")
    assert err.endswith("\nKeyboardInterrupt\n")
    assert err.count("Traceback") == 1


def test_ctrl_c_under_mpirun(model):
    running = under_mpirun(GENERATING, model)
    line_of(running)
    os.killpg(running.process.pid, signal.SIGINT)
    assert running.end(END_S)[0] != 0


def test_a_killed_rank_under_mpirun_ends_all_ranks(model):
    running = under_mpirun(GENERATING, model)
    rank_0 = int(line_of(running))
    (rank_1,) = set(ranks_of(running)) - {rank_0}
    os.kill(rank_1, signal.SIGKILL)
    assert running.end(END_S)[0] != 0


@STARTERS
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_script_leaves_no_process(model, started, number):
    running = started(GENERATING, model)
    os.kill(int(line_of(running)), number)
    check_all_end(running)


def test_a_script_killed_during_startup_leaves_no_process(model):
    running = plain(STARTING, model, MINITP_TEST_FAULT="lag loading 1")
    line_of(running)
    wait_until(lambda: len(ranks_of(running)) == 2)
    running.process.kill()
    check_all_end(running)


def check_all_end(running):
    """Check that all processes end; remove the temporary folder that a killed script leaves."""
    running.process.communicate(timeout=END_S)
    wait_until(lambda: not running.processes())
    shutil.rmtree(running.folder)


# --- ranks that die -------------------------------------------------------------------------------------


DYING = """
ended = []
try:
    llm = start(tp=int(sys.argv[2]), on_end=ended.append)
    print("started", flush=True)
    llm.generate(["Hello", "Bye"], LONG)
except Exception as error:
    print(type(error).__name__, error, sep="|", end="|\\n", flush=True)
    for _ in range(100):
        ended or time.sleep(0.05)
    print(len(ended), flush=True)
    time.sleep(600)
"""


def last_words(running):
    """Return the lines of the error that the script prints: the message, then the last lines of the rank."""
    lines = [line_of(running)]
    while not lines[-1].endswith("|"):
        lines.append(line_of(running))
    kind, said, _ = "\n".join(lines).split("|")
    assert kind == "RankError"
    wait_until(lambda: list(running.processes()) == [running.process.pid])
    assert line_of(running) == "1", "on_end was called"
    running.process.kill()
    running.end(END_S)
    return said.split("\n")


SAID = {
    "kill": r"rank {} \(pid [0-9]+\) died: killed, out of memory, or crashed",
    "raise": r"rank {} failed: ZeroDivisionError: a fault for the test",
}


@pytest.mark.parametrize(
    ("fault", "tp"),
    [
        ("kill batch 0", 1),
        ("kill batch 0", 2),
        ("kill batch 2", 3),
        ("kill loading 0", 1),
        ("kill loading 1", 2),
        ("raise batch 0", 1),
        ("raise batch 1", 2),
        ("raise loading 1", 2),
    ],
)
def test_a_rank_that_fails_is_named_and_shows_its_last_words(model, fault, tp):
    """Let a rank fail while it loads or serves: the other ranks end, and the script goes on."""
    kind, place, rank = fault.split()
    running = plain(DYING, model, tp, MINITP_TEST_FAULT=fault)
    if place == "batch":
        assert line_of(running) == "started"
    said, *words = last_words(running)
    assert re.fullmatch(SAID[kind].format(rank), said)
    if fault != "raise loading 1":  # here all ranks learn of the error and exit in order
        assert words[0] == f"  last words of rank {rank}"


def test_a_rank_that_is_killed_while_idle(model):
    """Check that on_end is called at once, and that later calls raise the same error."""
    script = (
        "llm = start(on_end=lambda error: print(error, flush=True))\nprint('ready', flush=True)\n"
        "while llm.error is None: time.sleep(0.01)\n"
        "try: llm.generate('Hello')\nexcept Exception as error: print(type(error).__name__, error)"
    )
    running = plain(script, model)
    assert line_of(running) == "ready"
    victim = ranks_of(running)[-1]
    os.kill(victim, signal.SIGKILL)
    said = line_of(running)
    assert re.fullmatch(SAID["kill"].format("[01]"), said)
    assert f"(pid {victim})" in said
    assert running.end(END_S) == (0, f"RankError {said}\n", "")


# --- while idle -----------------------------------------------------------------------------------------


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@STARTERS
def test_idle_ranks_sleep(model, started):
    """Measure the CPU time of idle ranks after some work."""
    script = "llm = start()\nllm.generate('Hello')\nprint('idle', flush=True)\ntime.sleep(600)"
    running = started(script, model)
    line_of(running)
    time.sleep(1)
    ranks = ranks_of(running)
    assert len(ranks) == 2
    before = [cpu_seconds(pid) for pid in ranks]
    time.sleep(IDLE_S)
    used = [cpu_seconds(pid) - then for pid, then in zip(ranks, before, strict=True)]
    running.kill_all()
    running.end(END_S)
    assert max(used) <= MOST_WHILE_IDLE * IDLE_S + 1 / os.sysconf("SC_CLK_TCK"), "one clock tick of tolerance"
