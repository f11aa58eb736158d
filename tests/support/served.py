"""Helpers for tests of `minitp serve`: tiny models, a running server, and the reference without it."""

import json
import re
import sys
import threading

import httpx
from openai import OpenAI
from running import Running
from tiny import write_tiny

from minitp.comm.single import SingleRank
from minitp.device import open_device
from minitp.generate import generate
from minitp.load import load_model
from minitp.loading.source import open_model
from minitp.request import Request
from minitp.sampling import SamplingParams

CHAT_TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{{ loud }}[assistant]"
URL = re.compile(r"at (http://\S+)/v1 ")
START_S = 60


def write_chatty(directory, **config):
    """Write a tiny model with a chat template, in which each byte is a token."""
    write_tiny(directory, **config)
    fields = {"chat_template": CHAT_TEMPLATE, "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(fields))
    return directory


class Served(Running):
    """A running server; `lines` is its stderr so far, and `url` its address."""

    def __init__(self, model, *options, command=(sys.executable, "-m", "minitp"), **variables):
        super().__init__([*command, "serve", "--model", model, "--port", 0, *options], **variables)
        self.lines, self._ready = [], threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()
        assert self._ready.wait(START_S), self.lines
        (self.url,) = (found[1] for found in map(URL.search, self.lines) if found)

    def _listen(self):
        for line in self.process.stderr:
            self.lines.append(line.decode())
            if URL.search(self.lines[-1]):
                self._ready.set()
        self._ready.set()

    def client(self, **options):
        """Return an OpenAI client of this server that does not retry."""
        return OpenAI(
            base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 60} | options
        )

    def end_within(self, seconds):
        """Wait for the end, check that no process is left, and return the exit code."""
        self.process.wait(seconds)
        self.check_nothing_is_left(within=2)
        return self.process.returncode

    def stop(self):
        """Send SIGTERM; check that the server exits with 0."""
        self.process.terminate()
        assert self.end_within(10) == 0, self.lines


class Reference:
    """A model alone in this process, for comparison."""

    def __init__(self, directory):
        self.source = open_model(str(directory), 1)
        self.model = load_model(self.source, SingleRank(), open_device("float32"))
        self.tokenizer = self.source.tokenizer()

    def request(self, prompt, **params):
        """Run a Request to its end, greedily by default, and return it; the prompt is a text or token ids."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        config = self.source.config
        request = Request(
            SamplingParams(**params),
            config.eos_token_ids,
            ids,
            config.max_position_embeddings,
            self.tokenizer,
        )
        for _ in generate(self.model, ids, request):
            pass
        return request

    def text(self, prompt, **params):
        return self.request(prompt, **params).text


def rendered(*messages):
    """Return the text that CHAT_TEMPLATE makes of (role, content) pairs."""
    return "".join(f"[{role}]{content}\n" for role, content in messages) + "[assistant]"


def metric(server, name):
    """Return the value of a metric without labels."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    (value,) = (float(line.split()[1]) for line in lines if line.startswith(f"{name} "))
    return value
