"""Conversations as a model's own template writes them, wherever and in whichever form it comes."""

import json
import re
from datetime import datetime

import pytest

from minitp.errors import InputError
from minitp.loading.demo import demo_directory
from minitp.text.chat_template import ChatTemplate, load_chat_template

HI = [{"role": "user", "content": "Hi"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]


def rendered(template, messages=HI, **tokens):
    return ChatTemplate(template, tokens, "a model").render(messages)


def template_of(directory, fields=None, own=None):
    """The ChatTemplate of a directory that holds a tokenizer_config.json, a chat_template.jinja, or both."""
    if fields is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")
    if own is not None:
        (directory / "chat_template.jinja").write_text(own, encoding="utf-8")
    return load_chat_template(directory, "a model")


# --- where it comes from --------------------------------------------------------------------------------


NAMED = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "the default"}]


@pytest.mark.parametrize(
    ("fields", "own", "expected"),
    [
        ({"chat_template": "a string"}, None, "a string"),
        ({"chat_template": NAMED}, None, "the default"),
        (None, "a file: é", "a file: é"),
        ({"bos_token": "<s>"}, "{{ bos_token }}", "<s>"),
        ({"chat_template": "a string"}, "a file", "a file"),
        ({"chat_template": NAMED}, "a file", "a file"),
    ],
)
def test_where_a_template_lies(tmp_path, fields, own, expected):
    assert template_of(tmp_path, fields, own).render(HI) == expected


@pytest.mark.parametrize(
    "fields",
    [None, {}, {"chat_template": None}, {"chat_template": [NAMED[0]]}, {"chat_template": []}],
    ids=json.dumps,
)
def test_a_model_without_a_template_is_said_to_continue_text_only(tmp_path, fields):
    with pytest.raises(InputError, match=r"^a model has no chat template: .*or use a chat model$"):
        template_of(tmp_path, fields)


@pytest.mark.parametrize(
    "form", [str, lambda text: {"content": text, "lstrip": False}], ids=["text", "object"]
)
def test_special_tokens_as_text_and_as_objects(tmp_path, form):
    fields = {
        "bos_token": form("<s>"),
        "eos_token": form("</s>"),
        "chat_template": "{{ bos_token }}{{ eos_token }}",
    }
    assert template_of(tmp_path, fields).render(HI) == "<s></s>"


@pytest.mark.parametrize("fields", [{}, {"bos_token": None, "eos_token": None}], ids=json.dumps)
def test_special_tokens_that_a_model_has_not_are_empty(tmp_path, fields):
    fields = {**fields, "chat_template": "[{{ bos_token }}{{ eos_token }}{{ bos_token + 'x' }}]"}
    assert template_of(tmp_path, fields).render(HI) == "[x]"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b'{"chat_template": "\xff"}'),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"chat_template": 5}'),
        ("tokenizer_config.json", b'{"chat_template": ["default"]}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}'),
        ("chat_template.jinja", b"\xff"),
        ("chat_template.jinja", b"{% if %}"),
        ("chat_template.jinja", b"{% for m in messages %}"),
        ("chat_template.jinja", b"{{ 'x' | no_such_filter }}"),
    ],
)
def test_a_broken_template_is_refused_when_it_is_read(tmp_path, file, content):
    """In one line that says whose or which file it is."""
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_chat_template(tmp_path, "a model")
    assert re.search(rf"{file}|a model", str(caught.value))
    assert "has no chat template" not in str(caught.value)
    assert "\n" not in str(caught.value)


# --- what a template may do -----------------------------------------------------------------------------


def test_messages_in_their_order_and_the_beginning_of_an_answer():
    template = (
        "{% for message in messages %}<{{ message.role }}>{{ message['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert rendered(template, TALK, eos_token="\n") == (
        "<system>Be brief.\n<user>Hi\n<assistant>Hello.\n<user>Bye\n<assistant>"
    )


def test_blocks_take_the_line_that_they_stand_on():
    """The newline behind a block and the blanks before it, as templates of several lines are written."""
    lines = [
        "{% for m in messages %}",
        "    {% if m.role == 'user' %}",
        "{{ m.content }}",
        "    {% endif %}",
        "{% endfor %}",
        "end",
    ]
    template = "\n".join(lines)
    assert rendered(template, TALK) == "Hi\nBye\nend"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }} {% endfor %}",
         "system user "),
        ("{% for m in messages %}{% if m.role != 'user' %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
         "useruser"),
        ("{{ messages[1] | tojson }}", '{"role": "user", "content": "Hi"}'),
        ("{{ '<é & \\'> \"' | tojson }}", '"<é & \'> \\""'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ {'b': 'é', 'a': 1} | tojson(ensure_ascii=False) }}", '{"b": "é", "a": 1}'),
        ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=True) }}", '{"a": 2, "b": 1}'),
        ("{{ '<b>&</b>' }}", "<b>&</b>"),
        ("{% if tools %}tools{% endif %}{% if nothing is defined %}nothing{% endif %}.", "."),
        ("{% set ns = namespace() %}{% for m in messages %}{% set ns.n = loop.index %}{% endfor %}{{ ns.n }}",
         "4"),
    ],
)  # fmt: skip
def test_what_templates_rely_on(template, expected):
    """As in Hugging Face's library, where JSON is written neither in ASCII nor for HTML."""
    assert rendered(template, TALK) == expected


def test_today():
    before = datetime.now()
    text = rendered("{{ strftime_now('%d %b %Y') }}")
    assert text in [day.strftime("%d %b %Y") for day in (before, datetime.now())]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ raise_exception('roles must\\nalternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ nobody.name }}", "'nobody' is undefined"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages[0].content.index('x') }}", "substring not found"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_template_that_fails_refuses_the_messages_and_says_why(template, reason):
    with pytest.raises(InputError, match="the chat template of a model refuses these messages: ") as caught:
        rendered(template)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


# --- messages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "which"),
    [
        ([], "there is none"),
        (None, "there is none"),
        ((), "there is none"),
        ({"role": "user", "content": "Hi"}, "there is none"),
        (["Hi"], "number 0 is not"),
        ([{}], "number 0 is not"),
        ([{"role": "user"}], "number 0 is not"),
        ([{"content": "Hi"}], "number 0 is not"),
        ([{"role": "user", "content": None}], "number 0 is not"),
        ([{"role": 1, "content": "Hi"}], "number 0 is not"),
        ([*HI, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "number 1 is not"),
        ([*TALK, ("user", "Hi")], "number 4 is not"),
    ],
)
def test_messages_of_another_form_are_refused_by_number(messages, which):
    with pytest.raises(InputError) as caught:
        rendered("never rendered", messages)
    assert str(caught.value).endswith(f"; {which}")
    assert str(caught.value).startswith(
        "messages are a list of objects with a role (system, user, assistant)"
    )


def test_messages_may_be_empty_and_have_more_fields():
    messages = [{"role": "tool", "content": "", "name": "clock"}]
    assert rendered("{{ messages[0].name }}:{{ messages[0].content }}", messages) == "clock:"


def test_the_demo_models_own():
    template = load_chat_template(demo_directory(), "smollm2")
    assert template.render(TALK) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert template.render(HI).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
