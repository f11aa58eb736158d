"""The browser that the tests of pages use, and its control through the DevTools protocol."""

import json
import select
import shutil
import subprocess
import time

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome")

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
FLAGS += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--remote-debugging-pipe"]
WAIT_S = 15
SHIFT = 8  # bit of the Shift key in the modifiers


class Browser:
    """A Chromium with one page, driven by JSON objects, each terminated by a zero byte."""

    def __init__(self, profile):
        # Chromium reads from descriptor 3 and writes to 4; the shell makes them from stdin and stdout.
        command = ["/bin/sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >&2', "sh", CHROMIUM, *FLAGS]
        command += [f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        self._unread, self._sent, self._session = b"", 0, {}
        self.complaints = []  # messages of the console
        (target,) = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """Return the result of a command; complaints that arrive meanwhile are kept."""
        self._sent += 1
        command = {"id": self._sent, "method": method, "params": params, **self._session}
        self._process.stdin.write(json.dumps(command).encode() + b"\0")
        while (message := self._hear()).get("id") != self._sent:
            if message.get("method") in (
                "Runtime.exceptionThrown",
                "Runtime.consoleAPICalled",
                "Log.entryAdded",
            ):
                self.complaints.append(message["params"])
        assert "error" not in message, message
        return message["result"]

    def _hear(self):
        while b"\0" not in self._unread:
            assert select.select([self._process.stdout], [], [], WAIT_S)[0], "the browser does not answer"
            new = self._process.stdout.read(1 << 16)
            assert new, "the browser has ended"
            self._unread += new
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    def run(self, expression):
        """Return the value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression):
        """Return once the expression is true."""
        deadline = time.monotonic() + WAIT_S
        while not self.run(expression):
            assert time.monotonic() < deadline, f"not {expression}:\n{self.run('document.body.innerText')}"
            time.sleep(0.02)

    def open(self, url):
        self.run("window.old = true")
        self.complaints.clear()
        self.call("Page.navigate", url=url)
        self.wait("!window.old && document.readyState === 'complete'")

    def text(self, selector):
        return self.run(f"document.querySelector({json.dumps(selector)}).textContent")

    def texts(self, selector):
        return self.run(f"[...document.querySelectorAll({json.dumps(selector)})].map(one => one.textContent)")

    def wait_for(self, selector, start):
        """Return once the text of such an element begins with `start`."""
        self.wait(
            f"document.querySelector({json.dumps(selector)})?.textContent.startsWith({json.dumps(start)})"
        )

    def is_shown(self, selector):
        return self.run(f"document.querySelector({json.dumps(selector)}).checkVisibility()")

    def fill(self, selector, value):
        self.run(f"document.querySelector({json.dumps(selector)}).value = {json.dumps(value)}")

    def value(self, selector):
        return self.run(f"document.querySelector({json.dumps(selector)}).value")

    def click(self, selector):
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def type(self, text, selector="#box"):
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)

    def press_enter(self, modifiers=0):
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", text="\r", **key)
        self.call("Input.dispatchKeyEvent", type="keyUp", **key)

    def send(self, text):
        self.type(text)
        self.press_enter()

    def wait_for_answer(self):
        self.wait("document.querySelector('#stop').hidden")

    def answers(self):
        """Return the raw texts of the answers."""
        return self.run("messages.filter(one => one.role === 'assistant').map(one => one.content)")

    def fake(self, path, status, body):
        """Answer the page's requests to `path` with this body, in chunks of one byte."""
        self.run(
            f"window.fakes = {{ ...window.fakes, [{json.dumps(path)}]: [{status}, {list(body.encode())}] }}"
        )
        self.run("""window.real ??= fetch; fetch = (path, options) => {
            if (!(path in fakes)) return real(path, options);
            const [status, bytes] = fakes[path];
            const start = stream => {
                bytes.forEach(byte => stream.enqueue(new Uint8Array([byte])));
                stream.close();
            };
            return Promise.resolve(new Response(new ReadableStream({ start }), { status }));
        }; null""")

    def keep_requests(self):
        """Keep the bodies of the page's requests in `sent`."""
        self.run("""window.sent = []; window.unkept = fetch; fetch = (path, options) => {
            if (options.body) sent.push(JSON.parse(options.body));
            return unkept(path, options);
        }; null""")

    def resize(self, width, height):
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def close(self):
        self.call("Browser.close")
        self._process.wait(WAIT_S)
