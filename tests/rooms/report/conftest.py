"""A fixture that shows reports in a headless Chromium, sends events to them and reads what they show."""

import html
import json
import re
import subprocess

import pytest
from chromium import CHROMIUM

from minitp.report.page import render

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
FLAGS += [
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
]

HARNESS = """<!doctype html><meta charset="utf-8">
%s
<pre id="out"></pre>
<script>
  const drive = (page, view) => { %s };
  const tried = frame => {
    try { return drive(frame.contentDocument, frame.contentWindow); }
    catch (error) { return String(error.stack); }
  };
  addEventListener('load', () => {
    const results = [...document.querySelectorAll('iframe')].map(tried);
    document.getElementById('out').textContent = JSON.stringify(results);
  });
</script>"""
HELPERS = """
  const one = selector => page.querySelector(selector), text = selector => one(selector).textContent;
  const all = selector => [...page.querySelectorAll(selector)], count = selector => all(selector).length;
  const at = name => all('#map td.cell').find(td => td.getAttribute('aria-label').startsWith(`${name}: `));
  const send = (target, Kind, type, more) => target.dispatchEvent(new Kind(type, { bubbles: true, ...more }));
  const press = key => send(page.activeElement, view.KeyboardEvent, 'keydown', { key });
  const colour = selector => view.getComputedStyle(one(selector)).backgroundColor;
  const state = () => ({
    error: page.documentElement.dataset.error ?? null, ready: 'ready' in page.documentElement.dataset,
    name: one('#detail h2')?.textContent, cells: count('#map td.cell'), bad: count('#map td.bad'),
  });
"""


@pytest.fixture
def drive(tmp_path):
    """Return a function that shows the pages of some data, runs a script in each, and returns the results."""

    def run(script, *datas, width=1280):
        frame = f'<iframe style="border:0" width="{width}" height="844" srcdoc="%s"></iframe>'
        frames = [frame % html.escape(render(data)) for data in datas]
        page = tmp_path / "page.html"
        page.write_text(HARNESS % ("\n".join(frames), HELPERS + script), encoding="utf-8")
        flags = [*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]
        done = subprocess.run([CHROMIUM, *flags, page.as_uri()], capture_output=True, timeout=60)
        complaints = [line for line in done.stderr.decode().splitlines() if "CONSOLE" in line]
        assert complaints == []
        out = re.search(r'<pre id="out">(.*)</pre>', done.stdout.decode(), re.DOTALL)
        results = json.loads(html.unescape(out[1]))
        for result in results:
            assert not isinstance(result, str), result  # an exception
        return results

    return run
