"""The Markdown of the chat page in a headless Chromium, without a server."""

import json

import pytest
from chromium import Browser, needs_chromium

from minitp.server.page import render


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(browser, tmp_path):
    """The page, opened as a file."""
    path = tmp_path / "page.html"
    path.write_text(render(), encoding="utf-8")
    browser.open(path.as_uri())
    return browser


# Markdown, and the HTML of the elements that show it, without `dir` and the copy buttons.
MARKDOWN = [
    ("One\ntwo\n\nthree", "<p>One\ntwo</p><p>three</p>"),
    ("**bold**, *italic*, __bold__", "<p><strong>bold</strong>, <em>italic</em>, <strong>bold</strong></p>"),
    ("***x*** **a *b***", "<p><strong><em>x</em></strong> <strong>a <em>b</em></strong></p>"),
    ("`x*y*`, ``a`b``", "<p><code>x*y*</code>, <code>a`b</code></p>"),
    ("2 * 3 * 4, a_b_c, \\*a\\*", "<p>2 * 3 * 4, a_b_c, *a*</p>"),
    ("# A *b*\n### C", "<h2>A <em>b</em></h2><h4>C</h4>"),
    ("#1 and #", "<p>#1 and #</p>"),
    ("Text:\n- a\n- b\n\nEnd", "<p>Text:</p><ul><li>a</li><li>b</li></ul><p>End</p>"),
    ("* a\n  more\n  * b\n* c", "<ul><li>a\nmore<ul><li>b</li></ul></li><li>c</li></ul>"),
    ("1. a\n\n2. b\n   - c", "<ol start=1><li>a</li><li>b<ul><li>c</li></ul></li></ol>"),
    ("3) a\n\n   b\n4) c", "<ol start=3><li>a<p>b</p></li><li>c</li></ol>"),
    ("- a\n\n1. b", "<ul><li>a</li></ul><ol start=1><li>b</li></ol>"),
    ("```py\nx = '<b>'\n\n  **y**\n```\nend", "[py|x = '&lt;b&gt;'\n\n  **y**]<p>end</p>"),
    ("1. a\n   ```\n   b\n     c\n   ```\n2. d", "<ol start=1><li>a[|b\n  c]</li><li>d</li></ol>"),
    ("~~~~\n```\n~~~~", "[|```]"),
    ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
    ("**שלום** a\n\n- b", "<p><strong>שלום</strong> a</p><ul><li>b</li></ul>"),
    ("<b>a</b> &amp; **<i>**", "<p>&lt;b&gt;a&lt;/b&gt; &amp;amp; <strong>&lt;i&gt;</strong></p>"),
]
# Markers without their other half, which are text in the end.
UNFINISHED = [
    ("**a", "<p>**a</p>"),
    ("a `b", "<p>a `b</p>"),
    ("*a **b* c", "<p><em>a **b</em> c</p>"),
    ("*a *b*", "<p>*a <em>b</em></p>"),
    ("**a\n\nb**", "<p>**a</p><p>b**</p>"),
    ("```\na\n``", "[|a\n``]"),
    ("****a****", "<p>****a****</p>"),
    ("-", "<ul><li></li></ul>"),
    ("42", "<p>42</p>"),
]
SHOW = """(texts => texts.map(text => {
    const body = document.createElement('div'), markdown = new Markdown(body), seen = [];
    const copy = () => body.cloneNode(true);
    const bare = node => {
        node.querySelectorAll('.bar').forEach(bar => bar.remove());
        return node.textContent;
    };
    if (STEP) for (let to = 1; to <= text.length; to += STEP) {
        markdown.show(text.slice(0, to), true);
        seen.push(bare(copy()));
    }
    markdown.show(text, false);
    const whole = copy();
    whole.querySelectorAll('.code').forEach(one => one.replaceWith(
        `[${one.querySelector('span').textContent}|`, one.querySelector('code').firstChild ?? '', ']'));
    const html = whole.innerHTML.replace(/ dir="(auto|ltr)"/g, '');
    return [html.replace(/start="(.*?)"/g, 'start=$1'), bare(copy()), seen];
}))"""


def shown(page, texts, step=0):
    """Return [HTML, text, texts shown before the end] of Markdown texts that arrive in steps, or at once."""
    return page.run(SHOW.replace("STEP", str(step)) + f"({json.dumps(texts)})")


@needs_chromium
@pytest.mark.parametrize("step", [0, 1, 3])
def test_markdown_becomes_elements_however_it_arrives(page, step):
    texts, expected = zip(*MARKDOWN, *UNFINISHED, strict=True)
    assert [html for html, *_ in shown(page, texts, step)] == list(expected)
    assert [one for one in page.complaints if "exceptionDetails" in one] == []


@needs_chromium
def test_what_is_shown_of_an_unfinished_answer_stays(page):
    """The text on the page only grows: half of a marker is never shown while the other half may follow."""
    texts = [text for text, _ in MARKDOWN]
    for text, (_, whole, before) in zip(texts, shown(page, texts, step=1), strict=True):
        for early in before:
            assert whole.startswith(early.rstrip("\n")), (text, early)


@needs_chromium
def test_a_selection_stays_while_the_answer_grows(page):
    page.run("""window.body = document.createElement('div'); log.append(body);
        window.markdown = new Markdown(body); window.text = ''; null""")
    page.run("markdown.show(text += 'The **first** paragraph\\n\\n- an item\\n- anoth', true)")
    pieces = ["er\\n", "- and **one", "** more\\n", "\\n```\\ncode", "\\n```\\n", "\\n- another\\n- anoth"]
    places = {"p strong": "first", "li:nth-child(2)": "another", "ul:last-child li": "another"}
    for selector, part in places.items():
        page.run(f"getSelection().selectAllChildren(body.querySelector('{selector}')); null")
        for more in pieces:
            page.run(f"markdown.show(text += '{more}', true)")
            assert page.run("getSelection().toString()").strip() in (part, part[:5])
    assert page.run("body.querySelectorAll('li').length") == 11


@needs_chromium
def test_a_long_answer_is_drawn_quickly(page):
    """Include a list of 8000 tokens, which is one block, and markers that have no other half."""
    page.run("""window.drawing = text => {
        const markdown = new Markdown(document.createElement('div')), started = performance.now();
        for (let to = 0; to < text.length; to += text.length / 20) markdown.show(text.slice(0, to), true);
        markdown.show(text, false);
        return performance.now() - started;
    }; null""")
    texts = [
        "word " * 8000,
        "- one of many items\n" * 2000,
        "```\n" + "x = 1\n" * 8000,
        "a **bold** word\n\n" * 2000,
    ]
    texts += ["*a **b " * 4000, "- " * 12000 + "x", "> " * 12000, "``` " + " " * 24000 + "`", "*" * 24000]
    texts += ["".join("`" * n + " " for n in range(220)), "".join(" " * n + "- a\n" for n in range(220))]
    took = {text[:12]: page.run(f"drawing({json.dumps(text)})") for text in texts}
    assert max(took.values()) < 4000, took  # ms; what is quadratic takes minutes
