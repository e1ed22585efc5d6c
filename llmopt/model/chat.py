"""Chat templates, rendered as transformers does.

A template is a program that came with a model, so it runs in jinja2's sandbox and sees nothing but plain values.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmopt.errors import ModelError


def render(template: str, messages: Sequence[Mapping[str, str]], variables: Mapping[str, object], *, where: str) -> str:
    """Fill a template with messages and variables.

    Raises:
        ModelError: the template is broken, refuses these messages, or tries what the sandbox forbids.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    plain = [dict(message) for message in messages]
    try:
        return environment.from_string(template).render(messages=plain, tools=None, documents=None, **variables)
    # A template can fail in any way that a program can.
    except Exception as error:
        raise ModelError(f"the chat template fails: {error}", where=where) from error


class _Generation(Extension):
    """`{% generation %}` marks, for training, what the assistant says; here it leaves its content as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """What stands between the tag and its end."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)  # local time, as transformers gives it


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which is not what a model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
