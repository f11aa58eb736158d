"""A model's chat template, written in Jinja, which turns messages into a prompt."""

import os
from pathlib import Path

from minitp.errors import InputError, one_line
from minitp.text.tokenizer_config import read_object, read_tokenizer_config, special_tokens
from minitp.util.files import why_unreadable

EXPECTED = "messages must be a list of objects with the strings role (system, user, assistant) and content"
# Variables that minitp sets itself; those of chat_template_kwargs must have other names.
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a message's reasoning, in clients
CALLS = ("tool_calls", "function_call", "audio")  # content of a message that is not text
# Text added to a message that the answer continues. A template that strips messages drops the final space.
MARKER = "THE-FINAL-MESSAGE-ENDS-HERE "


def load_chat_template(directory, name):
    """Return the ChatTemplate of a model's directory; `name` is the model's name in errors.

    Templates are in chat_template.jinja and additional_chat_templates/NAME.jinja, or else in the field
    chat_template of tokenizer_config.json, or else in that of chat_template.json. Of several templates, the
    one named "default" is used; chat_template.jinja has this name.

    Raises
    ------
    NoChatTemplateError
        if there is no template.
    InputError
        if the template is not valid, or there are several and none is the default.
    """
    fields = read_tokenizer_config(directory)
    template = template_files(Path(directory)) or fields.get("chat_template")
    if template is None:
        template = read_object(Path(directory) / "chat_template.json").get("chat_template")
    return make_chat_template({**fields, "chat_template": template}, name)


def template_files(directory):
    """Return the templates in a directory's .jinja files, by name."""
    named = directory / "additional_chat_templates"
    files = {"default": directory / "chat_template.jinja"} | {
        path.stem: path for path in sorted(named.glob("*.jinja"))
    }
    return {name: read_text(path) for name, path in files.items() if os.path.lexists(path)}


def read_text(path):
    """Return a file's text, or raise an InputError if it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {why_unreadable(path, error)}") from error
    except ValueError as error:
        raise InputError(f"{path}: not UTF-8: {one_line(error)}") from error


def make_chat_template(fields, name):
    """Return the ChatTemplate in the settings of a tokenizer; see `read_tokenizer_config`.

    The field chat_template is null, a template, or several: an object of templates by name, or a list of
    objects with the fields "name" and "template".

    Raises
    ------
    NoChatTemplateError
        if there is no template.
    InputError
        if the template is not valid, or there are several and none is the default.
    """
    template = fields["chat_template"]
    if isinstance(template, list) and all(isinstance(one, dict) and "template" in one for one in template):
        template = {str(one.get("name")): one["template"] for one in template}
    if isinstance(template, dict) and template:
        if "default" not in template:
            raise InputError(
                f"{name} has chat templates with the names {', '.join(template)}, and none is the default; "
                "copy the one to use to chat_template.jinja in the model's directory"
            )
        template = template["default"]
    if template in (None, [], {}):
        raise NoChatTemplateError(
            f"{name} has no chat template, so it cannot chat; ask for a completion, or use a chat model"
        )
    if not isinstance(template, str):
        raise InputError(f"chat_template of {name} is {template!r:.50}, expected a string")
    return ChatTemplate(template, special_tokens(fields), name)


class NoChatTemplateError(InputError):
    """The error for a model without a chat template."""


class RejectedMessagesError(InputError):
    """The error for messages that a template rejects by calling `raise_exception`."""


class ChatTemplate:
    """A template that renders messages as the model was trained to read them.

    Parameters
    ----------
    template : str
    tokens : dict
        The text of each special token, by the name that templates use, such as "bos_token".
    name : str
        The model's name in errors.

    Attributes
    ----------
    text : str
        The template.
    """

    def __init__(self, template, tokens, name):
        from jinja2 import TemplateError

        from minitp.text.template_environment import template_environment

        self.text, self._tokens, self._name = template, tokens, name
        try:
            self._template = template_environment().from_string(template)
        except TemplateError as error:
            raise InputError(f"the chat template of {name} is not valid: {one_line(error)}") from error

    def render(self, messages, variables=None, add_generation_prompt=None, continue_final_message=False):
        """Return the prompt of a conversation, up to the start of the assistant's answer.

        Parameters
        ----------
        messages : list of dict
            Objects with the strings "role" and "content", which an assistant's message may lack. Other fields
            may be None, which means absent.
        variables : dict, optional
            Further variables of the template, such as Qwen 3's enable_thinking.
        add_generation_prompt : bool, optional
            End with the header of the assistant's answer; by default if no message is continued.
        continue_final_message : bool
            End with the content of the final message, which the answer continues. Spaces at the end of the
            content are left out only if the template strips messages.

        Raises
        ------
        RejectedMessagesError
            if the template rejects the messages.
        InputError
            if the messages do not have this form, a variable is reserved, the template fails, or the final
            message cannot be continued.
        """
        check_messages(messages)
        check_variables(variables or {})
        if add_generation_prompt and continue_final_message:
            raise InputError(
                "add_generation_prompt and continue_final_message are both true: an answer begins a message "
                "or continues the final one; leave one of them out"
            )
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        messages = [with_reasoning(present_fields(one)) for one in messages]
        content = messages[-1]["content"]
        if continue_final_message:
            messages[-1] = messages[-1] | {"content": content + MARKER}
        values = dict(
            messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt
        )
        prompt = self._run(self._tokens | (variables or {}) | values)
        return self._up_to_marker(prompt, content) if continue_final_message else prompt

    def _up_to_marker(self, prompt, content):
        """Return the part of a prompt that ends with the final message's content, where MARKER begins."""
        text, marker, rest = prompt.rpartition(MARKER.strip())
        if not marker or not text.rstrip().endswith(content.strip()):
            raise InputError(
                f"the chat template of {self._name} changes or omits the content of the final message, so an "
                "answer cannot continue it; leave out continue_final_message"
            )
        return text if rest.startswith(" ") else text.rstrip()

    def _run(self, values):
        """Run the template with these variables; return its output."""
        from minitp.text.template_environment import RejectionError

        try:
            return self._template.render(values)
        except Exception as error:  # a template is a program and may raise anything
            reason = " ".join(str(error).split())
            if isinstance(error, RejectionError):
                message = f"the chat template of {self._name} rejects these messages: {reason}"
                raise RejectedMessagesError(message) from error
            raise InputError(f"the chat template of {self._name} fails: {reason}") from error


def present_fields(message):
    """Return a message without fields that are None or empty calls; absent content becomes an empty text."""
    present = {
        key: value for key, value in message.items() if value is not None and (value or key not in CALLS)
    }
    return present | {"content": present.get("content", "")}


def with_reasoning(message):
    """Return a message whose reasoning has each name that templates use, as in transformers."""
    for name in REASONING:
        if name in message:
            return {"thinking": message[name], **message, "reasoning_content": message[name]}
    return message


def check_variables(variables):
    """Reject variables of a template that minitp sets itself."""
    for name in RESERVED:
        if name in variables:
            raise InputError(f"chat_template_kwargs has {name!r}, which minitp sets itself; leave it out")


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
            absent = key == "content" and message.get("role") == "assistant" and message.get(key) is None
            if not absent and not isinstance(message.get(key), str):
                raise InputError(f"{EXPECTED}; message {number} has no string {key!r}")
        for key in CALLS:
            if message.get(key):
                raise InputError(
                    f"message {number} has {key}, which minitp does not support; leave the field out"
                )
