"""A model's chat template, written in Jinja, which turns messages into a prompt."""

import json
from datetime import datetime
from pathlib import Path

from minitp.errors import InputError, one_line

EXPECTED = "messages must be a list of objects with the strings role (system, user, assistant) and content"


def load_chat_template(directory, name):
    """Return the ChatTemplate of a model's directory.

    The template is in the file chat_template.jinja, or else in the field chat_template of
    tokenizer_config.json: one template, or several named ones, of which "default" is used.

    Raises
    ------
    InputError
        if there is no template, or it is not valid.
    """
    path, jinja_file = Path(directory) / "tokenizer_config.json", Path(directory) / "chat_template.jinja"
    try:
        fields = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        template = fields.get("chat_template")
        if isinstance(template, list):
            template = {one["name"]: one["template"] for one in template}.get("default")
        if jinja_file.exists():
            template = jinja_file.read_text(encoding="utf-8")
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise InputError(
            f"{path.name} or {jinja_file.name} of {name} cannot be read: {one_line(error)}"
        ) from error
    if template is not None and not isinstance(template, str):
        raise InputError(f"{path.name} of {name}: chat_template is {template!r:.50}, expected a string")
    return make_chat_template({**fields, "chat_template": template}, name)


def make_chat_template(fields, name):
    """Return the ChatTemplate in the fields of a tokenizer_config.json; chat_template is a string or None.

    Raises
    ------
    InputError
        if chat_template is None or not a valid template.
    """
    template = fields["chat_template"]
    if template is None:
        raise InputError(
            f"{name} has no chat template, so it cannot chat; ask for a completion, or use a chat model"
        )
    tokens = {key: token_text(fields.get(key)) for key in ("bos_token", "eos_token")}
    return ChatTemplate(template, tokens, name)


def token_text(field):
    """Return the text of a special token, which is a string or an object in tokenizer_config.json."""
    return (field.get("content") if isinstance(field, dict) else field) or ""


class ChatTemplate:
    """A template that renders messages as the model was trained to read them.

    The Jinja environment is configured as in Hugging Face's library: it is sandboxed, trims blocks, and has
    `raise_exception` and `strftime_now`.
    """

    def __init__(self, template, tokens, name):
        import jinja2
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        environment.filters["tojson"] = lambda value, **options: json.dumps(
            value, **{"ensure_ascii": False} | options
        )
        self._tokens, self._name = tokens, name
        try:
            self._template = environment.from_string(template)
        except jinja2.TemplateError as error:
            raise InputError(f"the chat template of {name} is not valid: {one_line(error)}") from error

    def render(self, messages):
        """Return the prompt of a conversation, up to the start of the assistant's answer.

        Parameters
        ----------
        messages : list of dict
            Objects with the strings "role" and "content".

        Raises
        ------
        InputError
            if the messages do not have this form, or the template rejects them.
        """
        check_messages(messages)
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._tokens)
        except Exception as error:  # a template is a program and may raise anything
            reason = " ".join(str(error).split())
            raise InputError(f"the chat template of {self._name} rejects these messages: {reason}") from error


def check_messages(messages):
    """Reject messages that do not have the form of a conversation."""
    if not isinstance(messages, list):
        raise InputError(f"{EXPECTED}; found {type(messages).__name__}")
    if not messages:
        raise InputError(f"{EXPECTED}; the list is empty")
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InputError(f"{EXPECTED}; message {number} is not an object")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise InputError(f"{EXPECTED}; message {number} has no string {key!r}")


def raise_exception(message):
    """Raise the error by which a template rejects a conversation."""
    import jinja2

    raise jinja2.TemplateError(message)
