"""The Jinja environment of chat templates, which is configured as in Hugging Face's library."""

import json
from datetime import datetime

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class RejectionError(TemplateError):
    """The error by which a template rejects a conversation."""


class GenerationTag(Extension):
    """The block `{% generation %}`, which marks the assistant's words for training."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        """Return the content of the block, whose variables are its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.Scope(body, lineno=line)


def template_environment():
    """Return an environment that is sandboxed and trims blocks."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    environment.filters["tojson"] = to_json
    return environment


def raise_exception(message):
    """Reject the conversation."""
    raise RejectionError(message)


def strftime_now(format):
    """Return the local time as text."""
    return datetime.now().strftime(format)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Return a value as JSON; Jinja's own filter would also escape characters for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
