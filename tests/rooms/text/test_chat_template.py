"""Tests of chat templates: their sources, their features, and malformed messages."""

import json
import re
from datetime import datetime

import pytest
from continued_messages import EXPECTED, TEMPLATES, TEXTS, TOKENS, conversation

from minitp.errors import InputError
from minitp.loading.demo import demo_directory
from minitp.text.chat_template import RESERVED, ChatTemplate, RejectedMessagesError, load_chat_template

HI = [{"role": "user", "content": "Hi"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]


def rendered(template, messages=HI, **tokens):
    return ChatTemplate(template, tokens, "a model").render(messages)


def template_of(directory, fields=None, jinja=None):
    """Load the ChatTemplate of a directory with a tokenizer_config.json, a chat_template.jinja, or both."""
    if fields is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")
    if jinja is not None:
        (directory / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    return load_chat_template(directory, "a model")


# --- sources of a template ------------------------------------------------------------------------------


NAMED = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "the default"}]


@pytest.mark.parametrize(
    ("fields", "jinja", "expected"),
    [
        ({"chat_template": "a string"}, None, "a string"),
        ({"chat_template": NAMED}, None, "the default"),
        (None, "a file: é", "a file: é"),
        ({"bos_token": "<s>"}, "{{ bos_token }}", "<s>"),
        ({"chat_template": "a string"}, "a file", "a file"),
        ({"chat_template": NAMED}, "a file", "a file"),
    ],
)
def test_sources_of_a_template(tmp_path, fields, jinja, expected):
    assert template_of(tmp_path, fields, jinja).render(HI) == expected


def test_template_of_a_processor(tmp_path):
    """Check that chat_template.json, which belongs to a model's image processor, is the last choice."""
    (tmp_path / "chat_template.json").write_text('{"chat_template": "of the processor"}')
    assert template_of(tmp_path).render(HI) == "of the processor"
    assert template_of(tmp_path, {"chat_template": "of the tokenizer"}).render(HI) == "of the tokenizer"


@pytest.mark.parametrize(
    "fields",
    [None, {}, {"chat_template": None}, {"chat_template": {}}, {"chat_template": []}],
    ids=json.dumps,
)
def test_model_without_a_template(tmp_path, fields):
    with pytest.raises(InputError, match=r"^a model has no chat template, .*or use a chat model$"):
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
def test_missing_special_tokens_are_undefined(tmp_path, fields):
    text = "[{{ bos_token }}{{ eos_token }}{% if bos_token is defined %}defined{% endif %}]"
    assert template_of(tmp_path, {**fields, "chat_template": text}).render(HI) == "[]"
    template = template_of(tmp_path, {**fields, "chat_template": "{{ bos_token + 'x' }}"})
    with pytest.raises(InputError, match="'bos_token' is undefined"):
        template.render(HI)


@pytest.mark.parametrize("form", [list, lambda named: {one["name"]: one["template"] for one in named}])
def test_several_templates_without_a_default(tmp_path, form):
    with pytest.raises(InputError, match="names tool_use, rag, and none is the default; copy the one to use"):
        template_of(tmp_path, {"chat_template": form([NAMED[0], {"name": "rag", "template": "documents"}])})


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
def test_broken_template_is_rejected_on_loading(tmp_path, file, content):
    """Check that the message is one line that names the file or the model."""
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_chat_template(tmp_path, "a model")
    assert re.search(rf"{file}|a model", str(caught.value))
    assert "has no chat template" not in str(caught.value)
    assert "\n" not in str(caught.value)


# --- features of templates ------------------------------------------------------------------------------


def test_prompt_has_messages_in_order_and_the_start_of_an_answer():
    template = (
        "{% for message in messages %}<{{ message.role }}>{{ message['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert rendered(template, TALK, eos_token="\n") == (
        "<system>Be brief.\n<user>Hi\n<assistant>Hello.\n<user>Bye\n<assistant>"
    )


def test_blocks_are_trimmed():
    """Check that the newline after a block and the blanks before it are removed."""
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
def test_features_that_templates_rely_on(template, expected):
    """Check features of Hugging Face's library, whose JSON is not escaped for ASCII or HTML."""
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
        ("{{ unknown.name }}", "'unknown' is undefined"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages[0].content.index('x') }}", "substring not found"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_error_of_a_template_names_the_reason(template, reason):
    rejects = "raise_exception" in template
    verb = "rejects these messages" if rejects else "fails"
    with pytest.raises(InputError, match=f"the chat template of a model {verb}: ") as caught:
        rendered(template)
    assert isinstance(caught.value, RejectedMessagesError) == rejects
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", RESERVED)
def test_variables_that_minitp_sets_are_reserved(name):
    with pytest.raises(InputError, match=f"chat_template_kwargs has '{name}', which minitp sets itself"):
        ChatTemplate("", {}, "a model").render(HI, {name: None})


# --- messages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([], "the list is empty"),
        (None, "found NoneType"),
        ((), "found tuple"),
        ({"role": "user", "content": "Hi"}, "found dict"),
        (["Hi"], "message 0 is not an object"),
        ([{}], "message 0 has no string 'role'"),
        ([{"role": "user"}], "message 0 has no string 'content'"),
        ([{"content": "Hi"}], "message 0 has no string 'role'"),
        ([{"role": "user", "content": None}], "message 0 has no string 'content'"),
        ([{"role": 1, "content": "Hi"}], "message 0 has no string 'role'"),
        (
            [*HI, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
            "message 1 has no string 'content'",
        ),
        ([*TALK, ("user", "Hi")], "message 4 is not an object"),
    ],
)
def test_error_for_malformed_messages_has_the_message_number(messages, fault):
    with pytest.raises(InputError) as caught:
        rendered("never rendered", messages)
    assert str(caught.value).endswith(f"; {fault}")
    assert str(caught.value).startswith("messages must be a list of objects with the strings role")


@pytest.mark.parametrize("fields", [{}, {"content": None}, {"content": ""}], ids=json.dumps)
def test_an_assistants_message_without_content_is_an_empty_text(fields):
    messages = [*HI, {"role": "assistant"} | fields]
    assert rendered("{{ messages[1].content + '.' }}", messages) == "."


EMPTY = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": []}


def test_messages_of_the_openai_package_are_accepted():
    """Check a message as its `model_dump` returns it: templates must not see an empty list of calls."""
    messages = [*HI, {"role": "assistant", "content": "Yo"} | EMPTY]
    assert (
        rendered("{% for key in messages[1] %}{{ key }} {% endfor %}", messages)
        == "role content annotations "
    )


@pytest.mark.parametrize("name", ["tool_calls", "function_call", "audio"])
def test_a_message_with_calls_is_refused(name):
    with pytest.raises(InputError, match=f"message 1 has {name}, which minitp does not support"):
        rendered("never rendered", [*HI, {"role": "assistant", "content": None, name: {"id": "x"}}])


def test_content_may_be_empty_and_messages_may_have_more_fields():
    messages = [{"role": "tool", "content": "", "name": "clock"}]
    assert rendered("{{ messages[0].name }}:{{ messages[0].content }}", messages) == "clock:"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"reasoning": "a"}, "a/a"),
        ({"thinking": "a", "reasoning": "b"}, "a/a"),
        ({"reasoning_content": "a", "thinking": "b"}, "a/b"),
        ({"reasoning_content": None, "reasoning": "b"}, "b/b"),
        ({}, "/"),
    ],
)
def test_names_of_reasoning(fields, expected):
    messages = [{"role": "assistant", "content": ""} | fields]
    assert rendered("{{ messages[0].reasoning_content }}/{{ messages[0].thinking }}", messages) == expected


def test_template_of_the_demo_model():
    template = load_chat_template(demo_directory(), "smollm2")
    assert template.render(TALK) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert template.render(HI).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


# --- the end of the prompt ------------------------------------------------------------------------------


CONTINUED = json.loads(EXPECTED.read_text(encoding="utf-8"))


@pytest.mark.parametrize("number", range(len(TEXTS)))
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_continued_message_ends_as_in_transformers(name, number):
    template, expected = ChatTemplate(TEMPLATES[name], TOKENS, "a model"), CONTINUED[name][number]
    if expected is not None:
        messages = conversation(TEXTS[number])
        assert template.render(messages, continue_final_message=True) == expected
        assert template.render(messages, None, False, True) == expected
    else:
        with pytest.raises(InputError, match="of a model changes or omits the content of the final message"):
            template.render(conversation(TEXTS[number]), continue_final_message=True)


def test_the_demo_model_continues_a_message_exactly():
    template = load_chat_template(demo_directory(), "smollm2")
    messages = [*TALK, {"role": "assistant", "content": "Good "}]
    prompt = template.render(TALK, add_generation_prompt=True)
    assert template.render(messages, continue_final_message=True) == prompt + "Good "
    assert template.render(TALK, add_generation_prompt=False) == prompt.removesuffix(
        "<|im_start|>assistant\n"
    )


def test_an_answer_either_begins_a_message_or_continues_one():
    with pytest.raises(InputError, match="add_generation_prompt and continue_final_message are both true"):
        ChatTemplate("", {}, "a model").render(HI, None, True, True)
