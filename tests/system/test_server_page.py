"""The chat page in a headless Chromium, in front of a real server: what it shows, sends and stops.

Answers that a healthy server does not give come from a fetch that the test replaces.
"""

import json
import re
import time

import httpx
import pytest
from chromium import SHIFT, Browser, needs_chromium
from served import Served, write_chatty

from minitp.server.page import render
from minitp.server.requests import ApiError
from minitp.server.responses import event

pytestmark = pytest.mark.mpi

HOSTILE = "<img src=x onerror=\"document.title='broken'\"><b>bold</b>\n  & &amp; \u202e"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_chatty(tmp_path_factory.mktemp("models") / "chatty", max_position_embeddings=100_000)


@pytest.fixture(scope="module")
def server(directory):
    served = Served(directory, "--tp", 3)
    yield served
    served.stop()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(browser, server):
    """The page, opened again, with temperature 0 so that answers repeat."""
    browser.resize(1400, 900)
    browser.open(server.url)
    browser.wait_for("#state", "ready")
    browser.fill("#temperature", "0")
    return browser


def asked(server, *contents, **more):
    """Return the API's answer to a conversation: user, model, user, ..."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    body = {"model": "chatty", "messages": messages, "temperature": 0, **more}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body).json()


def text_of(answer):
    return answer["choices"][0]["message"]["content"]


def running(server):
    (value,) = re.findall(r"^minitp_sequences_running (\S+)$", httpx.get(f"{server.url}/metrics").text, re.M)
    return float(value)


def piece(text):
    """Return a server-sent event with a part of an answer."""
    choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
    return event(json.dumps({"choices": [choice], "usage": None}, ensure_ascii=False))


def answer_of(*texts):
    """Return the events of an answer in pieces."""
    usage = {"prompt_tokens": 5, "completion_tokens": len(texts), "total_tokens": 5 + len(texts)}
    return "".join(map(piece, texts)) + event({"choices": [], "usage": usage}) + event("[DONE]")


CHAT = "v1/chat/completions"


@needs_chromium
def test_the_model_and_the_server_are_named(browser, server):
    browser.open(server.url)
    browser.wait_for("#state", "ready")
    browser.wait_for("#model", "chatty")
    assert browser.run("document.title") == "chatty · minitp"
    assert browser.value("#temperature") == "0.7"
    assert browser.value("#most") == ""
    assert not browser.is_shown("#key-form")
    assert browser.complaints == []


@needs_chromium
def test_a_conversation_equals_that_of_the_api(page, server):
    first = asked(server, "Hello\nthere", max_tokens=24)
    second = asked(server, "Hello\nthere", text_of(first), "And then?", max_tokens=24)
    page.fill("#most", "24")
    page.type("Hello")
    page.press_enter(SHIFT)
    page.send("there")
    page.wait_for_answer()
    page.send("And then?")
    page.wait_for_answer()
    assert page.texts(".user .text") == ["Hello\nthere", "And then?"]
    assert page.answers() == [text_of(first), text_of(second)]
    assert page.value("#box") == ""
    for stats, answer in zip(page.texts(".stats"), (first, second), strict=True):
        of_prompt = answer["usage"]["prompt_tokens"]
        assert re.fullmatch(
            rf"24 tokens\s· \d+\.\d tok/s\s· first token \d+\.\d+ s\s· prompt of {of_prompt} tokens"
            r"\s· cut off at max tokens",
            stats,
        )
    page.click("#new")
    page.wait("!document.querySelector('article')")
    page.send("Hello\nthere")
    page.wait_for_answer()
    assert page.answers() == [text_of(first)]  # the earlier messages were not sent
    assert page.complaints == []


@needs_chromium
def test_the_temperature_is_sent(page):
    page.keep_requests()
    page.fill("#temperature", "1.25")
    page.fill("#most", "1")
    page.send("Hello")
    page.wait_for_answer()
    assert page.run("sent.pop()") == {
        "messages": [{"role": "user", "content": "Hello"}],
        "temperature": 1.25,
        "max_tokens": 1,
        "model": "chatty",
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    page.fill("#temperature", "3")  # the browser rejects the value
    page.send("Hello")
    page.fill("#temperature", "0")
    page.fill("#most", "")
    assert page.run("sent") == []
    page.press_enter()
    page.wait("sent.length")
    assert page.run("[sent[0].temperature, 'max_tokens' in sent[0]]") == [0, False]
    page.click("#stop")


@needs_chromium
@pytest.mark.parametrize("button", ["#stop", "#new"])
def test_an_answer_is_shown_as_it_comes_until_it_is_stopped(page, server, button):
    page.send("Hello")
    page.wait("/\\d tokens?.* tok\\/s.*first token/.test(document.querySelector('.stats')?.textContent)")
    early = page.text(".assistant .text")
    assert early
    page.wait(f"document.querySelector('.assistant .text').textContent.length > {len(early)}")
    assert running(server) == 1
    page.send("not yet")  # a message that stays in the box
    assert len(page.texts("article")) == 2
    page.click(button)
    page.wait_for_answer()
    deadline = time.monotonic() + 5
    while running(server):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert page.value("#box") == "not yet"
    if button == "#stop":
        assert page.text(".stats").startswith("stopped")
        assert text_of(asked(server, "Hello", max_tokens=1)) == page.answers()[0][0]
    page.wait(f"document.querySelectorAll('article').length === {2 if button == '#stop' else 0}")
    assert page.texts(".error") == [""]  # the empty error of the key form
    assert page.complaints == []


@needs_chromium
def test_the_log_follows_the_answer_unless_the_reader_scrolled_up(page):
    page.resize(360, 400)
    page.send("Hello")
    page.wait("log.scrollHeight > log.clientHeight + 100")
    page.wait("log.scrollHeight - log.scrollTop - log.clientHeight < 2")
    page.run("log.scrollTop = 20")
    height = page.run("log.scrollHeight")
    page.wait(f"log.scrollHeight > {height} + 200")
    assert page.run("log.scrollTop") == 20
    page.click("#stop")
    page.wait_for_answer()
    assert page.run("log.scrollTop") == 20


@needs_chromium
@pytest.mark.parametrize("width", [360, 1400])
def test_no_text_is_html_or_too_wide(page, width):
    page.resize(width, 740)
    page.fake(CHAT, 200, answer_of(HOSTILE, "y" * 500, "\n  <script>"))
    page.send(HOSTILE + "x" * 500)
    page.wait_for_answer()
    assert page.text(".user .text") == HOSTILE + "x" * 500
    assert page.text(".assistant .text") == HOSTILE + "y" * 500 + "\n  <script>"
    assert page.run("document.querySelectorAll('img, b, #log script').length") == 0
    assert page.run("document.title") == "chatty · minitp"
    assert page.run("Math.max(document.documentElement.scrollWidth, log.scrollWidth)") <= width
    assert page.run("document.querySelector('.user .text').innerText") == HOSTILE + "x" * 500  # and lines
    for selector in ("#new", "#send", "#most", ".user", ".assistant"):
        box = page.run(f"document.querySelector('{selector}').getBoundingClientRect().toJSON()")
        assert box["left"] >= 0, selector
        assert box["right"] <= width, selector
    assert page.run("send.getBoundingClientRect().bottom") <= 740
    assert page.complaints == []


@needs_chromium
def test_a_rejected_message_goes_back_into_the_box(page, server):
    page.fill("#most", "2e20")
    page.send("Hello")
    page.wait_for("#log > .error", "Error: ")
    rejected = asked(server, "Hello", max_tokens=2 * 10**20)["error"]["message"]
    assert "max_tokens: expected a whole number" in rejected
    assert page.text("#log > .error") == f"Error: {rejected}"
    assert page.value("#box") == "Hello"
    assert page.texts("article") == []
    page.fill("#most", "4")
    page.press_enter()
    page.wait_for_answer()
    assert page.texts("#log .error") == []
    assert page.texts(".user") == ["Hello"]
    assert page.answers() == [text_of(asked(server, "Hello", max_tokens=4))]


@needs_chromium
def test_an_error_in_the_middle_of_an_answer(page):
    page.fake(CHAT, 200, piece("“half") + piece(" an…") + event(ApiError(500, "rank 1 died").object()))
    page.send("Hello")
    page.wait_for_answer()
    assert page.text(".assistant .text") == "“half an…"
    assert page.text(".assistant .error") == "Error: rank 1 died"
    assert page.value("#box") == ""
    page.fake(CHAT, 200, piece("half"))
    page.send("Again")
    page.wait_for_answer()
    assert page.texts(".assistant .error")[1] == "Error: the connection closed before the answer was complete"


@needs_chromium
def test_the_state_of_the_server_is_shown(page):
    def fake_health(status):
        page.fake("health", 503, json.dumps({"status": status}))

    fake_health("loading")
    page.wait_for("#state", "loading")  # the page polls
    page.run("for (let timer = 0; timer < 10_000; timer++) clearTimeout(timer)")  # stops the polling
    fake_health("draining")
    page.run("checkHealth()")
    assert page.text("#state") == "shutting down"
    fake_health("failed")
    failed = ApiError(503, "the model has failed; the server is shutting down")
    page.fake(CHAT, 503, json.dumps(failed.object()))
    page.send("Hello")
    page.wait_for("#log > .error", "Error: the model has failed; the server is shutting down")
    page.wait("state.textContent === 'the model has failed'")  # at once, because the server ends soon


@needs_chromium
def test_the_key_is_asked_for_and_the_end_of_the_server_is_shown(browser, directory):
    server = Served(directory, "--tp", 1, "--api-key", "sesame")
    browser.open(server.url)
    browser.wait_for("#state", "ready")
    browser.wait("document.querySelector('#key-form').checkVisibility()")
    assert browser.text("#key-error") == ""
    browser.type("wrong", "#key")
    browser.press_enter()
    browser.wait_for("#key-error", "the API key is missing or wrong")
    browser.type("sesame", "#key")
    browser.press_enter()
    browser.wait_for("#model", "chatty")
    assert not browser.is_shown("#key-form")
    browser.wait_for("#ranks-summary", "1 rank, no collectives")
    assert httpx.get(f"{server.url}/ranks").status_code == 401
    browser.open(server.url)  # the key is still known
    browser.wait_for("#model", "chatty")
    assert not browser.is_shown("#key-form")
    browser.fill("#most", "3")
    browser.send("Hello")
    browser.wait_for_answer()
    assert browser.text(".stats").startswith("3 tokens\u00a0· ")
    server.stop()
    browser.send("Anybody there?")
    browser.wait_for("#log > .error", "Error: the server cannot be reached")
    browser.wait_for("#state", "not reachable")
    assert browser.value("#box") == "Anybody there?"
    assert len(browser.texts("article")) == 2


@needs_chromium
@pytest.mark.parametrize("clipboard", [True, False])
def test_copying_an_answer_and_its_code(page, server, clipboard):
    page.call("Emulation.setFocusEmulationEnabled", enabled=True)
    permissions = ["clipboardReadWrite", "clipboardSanitizedWrite"]
    page.call("Browser.grantPermissions", permissions=permissions, origin=server.url)
    answer = "**Do**:\n\n```py\nx = 1\n\n```\n"
    page.fake(CHAT, 200, answer_of("**Do**", answer[6:]))
    page.send("How?")
    page.wait_for_answer()
    page.run("window.read = () => clipboard.readText(); window.clipboard = navigator.clipboard; null")
    if not clipboard:  # as on a page that another machine serves over http
        page.run("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    for button, text in ((".below .copy", answer), (".code .copy", "x = 1\n")):
        page.run("clipboard.writeText('before')")
        page.click(button)
        page.wait_for(button, "Copied")
        assert page.run("read()") == text
    if clipboard:
        page.wait("document.querySelector('.code .copy').textContent === 'Copy'")


@needs_chromium
def test_the_last_answer_can_be_replaced(page):
    page.fill("#most", "5")
    page.keep_requests()
    for n, text in enumerate(("one", "two")):
        page.fake(CHAT, 200, answer_of(text))
        page.send(f"Question {n}")
        page.wait_for_answer()
    shown = "[...document.querySelectorAll('.again')].map(one => one.checkVisibility())"
    assert page.run(shown) == [False, True]
    page.fake(CHAT, 200, answer_of("three ", "3"))
    page.run("document.querySelectorAll('.again')[1].click()")
    page.wait_for_answer()
    assert page.answers() == ["one", "three 3"]
    assert page.texts(".assistant .text") == ["one", "three 3"]
    assert page.texts(".user") == ["Question 0", "Question 1"]
    assert page.run(shown) == [False, True]
    page.fake(CHAT, 503, json.dumps(ApiError(503, "the model is loading").object()))
    page.run("document.querySelectorAll('.again')[1].click()")
    page.wait_for("#log > .error", "Error: the model is loading")
    page.wait_for_answer()
    assert page.texts(".assistant .text") == ["one", "three 3"]
    assert page.run("document.querySelectorAll('.assistant')[1].checkVisibility()")
    assert page.answers() == ["one", "three 3"]
    assert page.value("#box") == ""


@needs_chromium
def test_the_system_prompt_is_used_from_the_next_message_on(page):
    page.fake(CHAT, 200, answer_of("Yes"))
    page.keep_requests()
    page.send("One")
    page.wait_for_answer()
    assert not page.is_shown("#system")
    page.click("#system-summary")
    page.type("Be brief.", "#system")
    page.click("#system-summary")
    assert page.text("#system-summary") == "System prompt (in use)"
    page.send("Two")
    page.wait_for_answer()
    page.click("#new")
    page.wait("!document.querySelector('article')")
    page.send("Three")
    page.wait_for_answer()
    page.run("system.value = ''; system.dispatchEvent(new Event('input')); null")
    assert page.text("#system-summary") == "System prompt"
    page.click(".again")
    page.wait_for_answer()
    sent = [[one["content"] for one in body["messages"]] for body in page.run("sent")]
    assert sent == [["One"], ["Be brief.", "One", "Yes", "Two"], ["Be brief.", "Three"], ["Three"]]
    assert page.run("sent[1].messages[0].role") == "system"


@needs_chromium
def test_an_empty_conversation_says_what_runs_and_offers_prompts(page):
    page.wait_for("#about", "chatty on 3 ranks, float32, context of 100000 tokens")
    prompts = page.texts("#prompts button")
    assert len(prompts) == 3
    page.fill("#most", "2")
    page.type("a draft")
    page.run("document.querySelectorAll('#prompts button')[1].click()")
    page.wait_for_answer()
    assert page.texts(".user") == [prompts[1]]
    assert page.text(".stats").startswith("2 tokens\u00a0· ")
    assert page.value("#box") == "a draft"
    assert not page.is_shown("#hint")
    page.click("#new")
    page.wait("hint.checkVisibility()")


def holding(tp, comm_seconds=0.5):
    """Return what /ranks says about `tp` ranks of 2 heads each."""
    each = {
        "weight_bytes": 1_610_000_000,
        "cache_bytes": 10,
        "comm_seconds": comm_seconds,
        "busy_seconds": 2.0,
    }
    ranks = [
        {"rank": r, "query_heads": [2 * r, 2 * r + 2], "kv_heads": [r, r + 1], **each} for r in range(tp)
    ]
    about = {"model": "chatty", "tp": tp, "dtype": "float16", "kv_dtype": "auto", "context": 1}
    return {**about, "chat_error": None, "ranks": ranks}


@needs_chromium
def test_the_parts_and_times_of_the_ranks_are_shown(page, server):
    page.wait_for("#ranks-summary", "3 ranks")
    page.fill("#most", "150")
    page.send("Hello")
    page.wait_for_answer()
    time.sleep(0.1)  # the ranks report their times after the end of the answer
    about = httpx.get(f"{server.url}/ranks").json()
    assert about["model"] == "chatty"
    assert about["chat_error"] is None
    assert [one["query_heads"] for one in about["ranks"]] == [[0, 2], [2, 3], [3, 4]]
    shares = [one["comm_seconds"] / one["busy_seconds"] for one in about["ranks"]]
    assert all(0 < share < 1 for share in shares)
    shown = "[...document.querySelectorAll('.share')].map(one => one.textContent).join()"
    expected = ",".join(f"{share:.0%} in collectives" for share in shares)
    page.wait(f"{shown} === {json.dumps(expected)}")
    assert page.text("#ranks-summary") == f"3 ranks, {sum(shares) / 3:.0%} of their time in collectives"
    held = [line.split("kB ")[0].rsplit(" ", 2)[0] for line in page.texts("#ranks-list li")]
    assert held == ["rank 0 heads 0-1, KV 0", "rank 1 head 2, KV 1", "rank 2 head 3, KV 1"]
    metrics = httpx.get(f"{server.url}/metrics").text
    for key, name in (("busy_seconds", "busy"), ("comm_seconds", "collective")):
        found = re.findall(rf'^minitp_rank_{name}_seconds_total{{rank="(\d)"}} (\S+)$', metrics, re.MULTILINE)
        assert [(int(rank), float(value)) for rank, value in found] == [
            (one["rank"], one[key]) for one in about["ranks"]
        ]


@needs_chromium
@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("tp", [4, 16])
def test_many_ranks_fit(page, width, tp):
    page.resize(width, 844)
    page.run(f"isFirst = true; showRanks({json.dumps(holding(tp))})")
    assert page.run("ranks.open") == (tp == 4 or width == 1400)
    page.run("ranks.open = true")
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run("document.querySelector('header').offsetHeight") < 844 * 0.45
    assert page.run("document.querySelector('#ranks-list li:last-child').offsetHeight") < 24  # one line
    assert page.run("log.clientHeight") > 200


@needs_chromium
def test_what_is_not_known_of_the_ranks_is_said(page):
    page.run(f"showRanks({json.dumps(holding(2, comm_seconds=None))})")
    assert page.text("#ranks-summary") == "2 ranks, time in collectives not measured on GPUs"
    assert page.text("#about") == "chatty on 2 ranks, float16, context of 1 token"
    problem = "chatty has no tokenizer.json, so it cannot chat"
    page.run(f"showRanks({json.dumps({**holding(1), 'chat_error': problem})})")
    assert page.text("#prompts") == problem
    assert not page.run("document.querySelector('#prompts button')")


def test_the_page_is_one_file():
    page = render()
    policy = re.search(r'Content-Security-Policy"\s+content="([^"]*)"', page)[1]
    assert policy.startswith(
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    )
    assert (
        re.findall(r"https?:|@import|url\(|\bimport\b|\bsrc=|innerHTML|outerHTML|insertAdjacent", page) == []
    )
    assert re.findall(r'href="([^"]*)"', page) == ["data:,"]
