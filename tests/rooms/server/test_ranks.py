"""The answer to /ranks says why a model cannot chat, without the path of the model."""

import json

import pytest
from served import write_chatty
from tiny import write_tiny

from minitp.loading.source import open_model
from minitp.server.ranks import chat_error


class Opened:
    """The part of an LLM that knows its tokenizer and chat template."""

    def __init__(self, directory):
        self.source = open_model(str(directory), 1)
        self.tokenizer = self.source.tokenizer()

    @property
    def chat_template(self):
        return self.source.chat_template()


def test_a_model_with_a_chat_template_can_chat(tmp_path):
    assert chat_error(Opened(write_chatty(tmp_path)), "chatty") is None


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no tokenizer", "base has no tokenizer.json"),
        ("no template", "base has no chat template"),
        ("wrong template", "the chat template of base is not valid"),
    ],
)
def test_the_reason_why_a_model_cannot_chat(tmp_path, kind, words):
    directory = write_tiny(tmp_path, tokenizer=kind != "no tokenizer")
    if kind == "wrong template":
        (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{% if"}))
    reason = chat_error(Opened(directory), "base")
    assert reason.startswith(words)
    assert str(directory) not in reason


def test_random_weights_cannot_chat():
    assert "no tokenizer" in chat_error(Opened("random:smollm2-135m"), "random:smollm2-135m")
