"""Chat messages to a prompt: the Jinja template that comes with a model."""

import json
from datetime import datetime
from pathlib import Path

from minitp.errors import InputError, one_line

ROLES = "messages are a list of objects with a role (system, user, assistant) and a content, both strings"


def load_chat_template(directory, name):
    """The ChatTemplate of a model's directory.

    It is a file of its own (chat_template.jinja) or a field of tokenizer_config.json: the template, or
    several with names, of which "default" is meant.

    Raises
    ------
    InputError
        if there is none, or it is no Jinja template
    """
    path, own = Path(directory) / "tokenizer_config.json", Path(directory) / "chat_template.jinja"
    try:
        fields = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        template = fields.get("chat_template")
        if isinstance(template, list):
            template = {one["name"]: one["template"] for one in template}.get("default")
        if own.exists():
            template = own.read_text(encoding="utf-8")
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise InputError(f"{path.name} or {own.name} of {name} cannot be read: {one_line(error)}") from error
    if template is not None and not isinstance(template, str):
        raise InputError(f"{path.name} of {name}: chat_template {template!r:.50}: expected a text")
    return make_chat_template({**fields, "chat_template": template}, name)


def make_chat_template(fields, name):
    """The ChatTemplate of tokenizer_config.json's fields, in which chat_template is a text or None.

    Raises
    ------
    InputError
        if it is None, or no Jinja template
    """
    template = fields["chat_template"]
    if template is None:
        raise InputError(
            f"{name} has no chat template: it continues text; ask for a completion, or use a chat model"
        )
    tokens = {key: token_text(fields.get(key)) for key in ("bos_token", "eos_token")}
    return ChatTemplate(template, tokens, name)


def token_text(field):
    """A special token as tokenizer_config.json has it: its text, or an object with that as content."""
    return (field.get("content") if isinstance(field, dict) else field) or ""


class ChatTemplate:
    """Renders messages as the model was trained to read them.

    The environment is that of Hugging Face's templates: sandboxed, blocks trimmed, with `raise_exception`
    and `strftime_now`.
    """

    def __init__(self, template, tokens, name):
        import jinja2
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.globals["raise_exception"] = refuse
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
        """The prompt of a conversation, up to where the assistant begins to answer.

        Parameters
        ----------
        messages : list of dict
            With "role" and "content".

        Raises
        ------
        InputError
            if they are not of this form, or the template refuses them
        """
        check_messages(messages)
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._tokens)
        except Exception as error:  # a template is a program, and may fail in any way
            reason = " ".join(str(error).split())
            raise InputError(f"the chat template of {self._name} refuses these messages: {reason}") from error


def check_messages(messages):
    """Refuse what is no conversation."""
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{ROLES}; there is none")
    for number, message in enumerate(messages):
        texts = [message.get(key) for key in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise InputError(f"{ROLES}; number {number} is not")


def refuse(message):
    """What a template calls that does not accept a conversation."""
    import jinja2

    raise jinja2.TemplateError(message)
