"""`minitp chat`: in a terminal, through a pipe, and the ways in which it ends."""

import os
import re
import signal
import subprocess
import sys
import time
from string import ascii_lowercase

import numpy as np
import pytest
from running import END_S, START_S, Running
from safetensors.numpy import load_file, save_file
from terminal import Terminal
from tiny import byte_tokens, write_tiny

from minitp import LLM, SamplingParams
from minitp.cli.conversation import Conversation, message
from minitp.launch import supervisor

pytestmark = pytest.mark.mpi

CHAT = [sys.executable, "-m", "minitp", "chat"]
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
CONTEXT = 300
SYSTEM = message("system", "Be brief.")


def write_chatty(directory, **options):
    """Write a tiny chat model that generates only lowercase letters; each byte is a token."""
    weights = write_tiny(directory, **options) / "model.safetensors"
    tensors = load_file(weights)
    letters = [byte_tokens().index(letter) for letter in ascii_lowercase]
    tensors["lm_head.weight"][np.delete(np.arange(258), letters)] = 0
    save_file(tensors, weights)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def prompt_length(*texts):
    """Return the number of tokens in a conversation in which the user and the model take turns."""
    roles = ["user", "assistant"] * len(texts)
    return sum(len(f"[{role}]{text}") for role, text in zip(roles, [*texts, ""], strict=False))


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """Options of a chat whose answers would take minutes."""
    directory = tmp_path_factory.mktemp("models") / "endless"
    write_chatty(directory, max_position_embeddings=1_000_000)
    return ["--model", directory, "--ignore-eos"]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    model = write_chatty(tmp_path_factory.mktemp("models") / "model")
    with LLM(model, tp=1, max_context=CONTEXT, max_sequences=1) as llm:
        yield llm


def talk(llm, opening=(), **params):
    """Return a Conversation without messages."""
    return Conversation(llm, SamplingParams(**{"max_new_tokens": 10, **params}), list(opening), stats=False)


def answers(llm, said, opening=()):
    """Return the model's answers to the messages of a conversation, a line each."""
    messages = list(opening)
    for text in said:
        messages.append(message("user", text))
        messages.append(message("assistant", llm.chat(messages, max_new_tokens=10).text))
    return "".join(f"{m['content']}\n" for m in messages if m["role"] == "assistant")


# --- the conversation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("opening", [[], [SYSTEM]])
def test_each_answer_is_to_all_that_has_been_said(llm, capsys, opening):
    conversation = talk(llm, opening)
    said = ["Hi", "Who are you?", "Really?"]
    assert all(conversation.say(text) for text in said)
    assert capsys.readouterr().out == answers(llm, said, opening)
    assert conversation.messages[1] != conversation.messages[3]


def test_the_oldest_is_left_out_of_a_long_conversation(llm, monkeypatch, capsys):
    """The system message stays, and many messages are dropped at once, so the beginning rarely changes."""
    sent, submit, text_of = [], llm.submit, llm.tokenizer.decode
    monkeypatch.setattr(llm, "submit", lambda ids, *more: sent.append(text_of(ids)) or submit(ids, *more))
    conversation = talk(llm, [SYSTEM], max_new_tokens=20)
    numbers = [f"{number:02} " for number in range(20)]
    for count, number in enumerate(numbers, start=1):
        conversation.say(number + "x" * 20)
        assert sent[-1].startswith("[system]Be brief.[user]")
        assert len(sent[-1]) <= CONTEXT - 20, "an answer has room"
        kept = [number for number in numbers if number in sent[-1]]
        assert kept == numbers[count - sent[-1].count("[user]") : count]
    assert 3 <= len({prompt[23:26] for prompt in sent}) <= 7
    assert capsys.readouterr().err.count("[the conversation has outgrown its context of 300 tokens") == 1


def test_a_message_that_is_too_long_is_refused_and_the_conversation_goes_on(llm, capsys):
    conversation = talk(llm)
    for text in ("Hi", "x" * CONTEXT, "Who are you?"):
        assert conversation.say(text)
    out, err = capsys.readouterr()
    assert out == answers(llm, ["Hi", "Who are you?"])
    assert "317 tokens, which leaves no room" in err


@pytest.mark.parametrize(
    ("params", "remark"),
    [
        ({"max_new_tokens": 7}, "[cut at 7 tokens; -n allows more]\n"),
        ({"max_new_tokens": CONTEXT}, f"[cut at {CONTEXT - 19} tokens: the context is full]\n"),
        ({"stop": list(ascii_lowercase), "max_new_tokens": 1}, ""),
    ],
)
def test_an_answer_that_is_not_whole_says_so(llm, capsys, params, remark):
    talk(llm, **params, ignore_eos=True).say("Hi")
    assert capsys.readouterr().err == remark


def test_what_is_stopped_before_its_first_word_is_forgotten(llm, monkeypatch):
    conversation = talk(llm)
    monkeypatch.setattr(llm, "submit", lambda *_: conversation.interrupt() or (lambda: None))
    assert conversation.say("Hi")
    assert conversation.messages == []


# --- through a pipe -------------------------------------------------------------------------------------


@pytest.mark.parametrize("beginning", [CHAT, [supervisor.find_mpirun(), "-n", "2", *CHAT]])
def test_each_line_of_a_pipe_is_a_message(llm, beginning):
    """Commands are messages, too; blank lines are ignored."""
    argv = [*beginning, "--model", llm.source.name, "--tp", "2", "-n", "10", "--system", SYSTEM["content"]]
    done = subprocess.run(
        argv, input="Hi\n\n  /help me\nReally?", capture_output=True, text=True, timeout=START_S
    )
    assert done.stdout == answers(llm, ["Hi", "/help me", "Really?"], [SYSTEM])
    assert (done.returncode, done.stderr) == (0, "[cut at 10 tokens; -n allows more]\n" * 3)


@pytest.mark.parametrize(("leaves", "code"), [("the user", 130), ("the reader", 0)])
def test_an_answer_through_a_pipe_is_cut_short(endless, tmp_path, leaves, code):
    (tmp_path / "said").write_text("Hi\nHo\n")
    running = Running(["sh", "-c", 'exec "$@" <"$0"', tmp_path / "said", *CHAT, *endless, "--tp", "1"])
    running.wait_for_output()
    if leaves == "the user":
        os.kill(running.process.pid, signal.SIGINT)
    else:
        running.process.stdout.close()
        running.process.stdout = None
    assert running.end(END_S)[::2] == (code, "")


@pytest.mark.parametrize(
    ("files", "options", "said"),
    [
        ({"chat_template.jinja": None}, [], "has no chat template"),
        ({"tokenizer.json": None}, [], "has no tokenizer.json"),
        ({"chat_template.jinja": "{{ raise_exception('no') }}"}, [], "rejects these messages: no"),
        ({"chat_template.jinja": "{{ unknown.name }}"}, [], "fails: 'unknown' is undefined"),
        ({}, ["--chat-template-kwargs", "{"], "--chat-template-kwargs: '{': expected a JSON object"),
        ({}, ["--chat-template-kwargs", '{"tools": []}'], "has 'tools', which minitp sets itself"),
        ({}, ["--system", "x" * 600], "626 tokens, which leaves no room"),
        ({}, ["--max-context", "513"], "--max-context 513: "),
        ({}, ["-n", "0"], "--max-new-tokens 0: "),
        ({}, ["--tp", "5"], "--tp 5: "),
    ],
)
def test_what_cannot_be_is_refused_before_ranks_start(refused, tmp_path, files, options, said):
    model = write_chatty(tmp_path)
    for name, content in files.items():
        (model / name).unlink() if content is None else (model / name).write_text(content)
    assert said in refused("chat", "--model", model, *options)


# --- in a terminal --------------------------------------------------------------------------------------


@pytest.fixture
def start(endless, tmp_path):
    """Start a chat in a terminal, up to its prompt."""
    started = []

    def start(*options, banner="endless on 1 rank, float32, context 1000000\n/help for help", **variables):
        started.append(Terminal([*CHAT, *endless, *options], tmp_path, **variables))
        assert banner in started[-1].prompt()
        return started[-1]

    yield start
    for terminal in started:
        terminal.close()


def test_a_conversation_in_a_terminal(start, tmp_path):
    terminal = start("--tp", "1", "--stats")

    def ask(text):
        """Send a message and stop its answer; return the number of prompt tokens and the answer."""
        terminal.type(f"{text}\n")
        terminal.until(f"{text}\r\n")
        begun = terminal.until("jx") + "jx"  # the answer is shown while it is generated
        terminal.type("\x03")
        answer = begun + terminal.until("\r\n[").replace("^C", "")
        numbers = re.fullmatch(
            r"(\d+) prompt .* s; (\d+) new tokens, [\d.]+ tokens/s .*\n", terminal.prompt()
        )
        assert int(numbers[2]) == len(answer)
        return int(numbers[1]), answer

    count, answer = ask("Hi")
    assert count == prompt_length("Hi")
    assert ask("Ho")[0] == prompt_length("Hi", answer, "Ho"), "what was said before Ctrl-C counts"
    said = {
        "/reset": "conversation reset",
        "/help": "/reset  forget",
        "/what is it": "/what is not a",
    }
    for command, reply in said.items():
        terminal.type(f"{command}\n")
        assert reply in terminal.prompt()
    assert ask(" /Ho")[0] == prompt_length("/Ho")
    terminal.type("\x04")
    assert terminal.end(END_S)[0] == 0
    history = tmp_path / "minitp" / "chat-history"
    assert history.read_text() == "Hi\nHo\n/reset\n/help\n/what is it\n /Ho\n"
    assert oct(history.stat().st_mode)[-3:] == "600"


def test_ctrl_c_clears_a_line_and_leaves_at_the_second_time_in_a_row(start, tmp_path):
    (tmp_path / "minitp").mkdir()
    (tmp_path / "minitp" / "chat-history").write_text("/help\n")
    terminal = start("--tp", "1")
    terminal.type("half a mess")
    terminal.until("half a mess")
    time.sleep(0.1)
    terminal.type("\x03")
    assert "press Ctrl-C again, or Ctrl-D, to leave\n" in terminal.prompt()
    terminal.type("\x10\n")  # the previous line, from the history file
    assert "/reset  forget" in terminal.prompt()
    terminal.type("\x03")
    assert "press Ctrl-C again, or Ctrl-D, to leave\n" in terminal.prompt()
    terminal.type("\x03")
    assert terminal.end(END_S)[0] == 130


@pytest.mark.parametrize("in_answer", [True, False])
def test_a_killed_rank(start, in_answer):
    terminal = start("--tp", "2", banner="endless on 2 ranks")
    if in_answer:
        terminal.type("Hi\n")
        terminal.until("jx")
    processes = terminal.processes().items()
    rank = next(pid for pid, line in processes if re.match(r"\S*python.* minitp ranks", line))
    os.kill(rank, signal.SIGKILL)
    if not in_answer:
        terminal.type("Hi\n")
    terminal.until("minitp: rank ")
    assert f"(pid {rank}) died: killed" in terminal.until("\n")
    assert terminal.end(END_S)[0] == 3


@pytest.mark.parametrize(("code", "term"), [(0, "dumb"), (143, "dumb"), (143, "xterm")])
def test_exit_and_sigterm(start, code, term):
    terminal = start("--tp", "1", TERM=term)
    terminal.type("/exit\n") if code == 0 else terminal.process.terminate()
    assert terminal.end(END_S)[0] == code
    assert terminal.echoes()


def test_prompt_toolkit_and_an_answer(start):
    """The answer is printed as it is, and Ctrl-C stops it."""
    pytest.importorskip("prompt_toolkit")
    terminal = start("--tp", "1", "--stats", TERM="xterm")
    for _ in range(2):
        terminal.type("/reset\r")
        terminal.until("[conversation reset]")
        terminal.prompt()
        terminal.type("Hi\r  Ho\r")
        terminal.until("jx")
        terminal.type("\x03")
        after = re.fullmatch(r"\w*(?:\^C)?\w*\n\[(\d+) prompt tokens, ", terminal.until("first new token"))
        assert int(after[1]) == prompt_length("Hi\n  Ho")
    terminal.prompt()
    terminal.type("\x04")
    assert terminal.end(END_S)[0] == 0
