"""Chat templates: the one that comes with the tokenizer, never one from a request.

Rendered as transformers renders them: jinja2, sandboxed, with ``raise_exception``, ``strftime_now``, loop controls,
``{% generation %}``, and a ``tojson`` that does not escape HTML.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.text.tokenizer import TextTokenizer, TokenizerError

_ESCAPED_MARK = re.compile(r"(\\\\)|\\u(fd[de][0-9a-f])")
"""A mark of :mod:`engine.spelling.guard` that JSON has escaped; a backslash before another is one of the text's own."""

_RESERVED = frozenset({"messages", "add_generation_prompt", "continue_final_message", "tools", "documents"})
_END = "\ue000END OF THE LAST MESSAGE\ue000 "
"""Marks where a conversation's last message ends, to be found in what the template makes of it."""


class ChatTemplateError(Exception):
    """The template refuses these messages. The message is the template's own."""


class _Generation(Extension):
    """``{% generation %} ... {% endgeneration %}``: marks what the model wrote, for training. Here it is a scope."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        """See jinja2."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class ChatTemplate:
    """A compiled template and the special tokens that it may use.

    Args:
        source: jinja2; kept as an attribute.
        special_tokens: ``bos_token`` and the like.

    Raises:
        TokenizerError: the template cannot be compiled.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template: Template = environment.from_string(source)
        except TemplateError as error:
            raise TokenizerError(f"tokenizer: the chat template is damaged: {str(error)[:200]}") from None
        self._special_tokens = special_tokens
        self.source = source

    @classmethod
    def find(cls, tokenizer: TextTokenizer) -> ChatTemplate | None:
        """The template of a tokenizer: ``chat_template.jinja`` beside it, else ``chat_template`` in its configuration.

        Raises:
            TokenizerError: there is one and it cannot be compiled.
        """
        config = tokenizer.config
        source: Any = config.get("chat_template")
        if isinstance(source, list):
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
        file = None if tokenizer.folder is None else tokenizer.folder / "chat_template.jinja"
        if file is not None and file.is_file():
            source = file.read_text("utf-8")
        if not isinstance(source, str):
            return None
        return cls(source, _special_tokens(config))

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> str:
        """The prompt for the next assistant message, or for the rest of the last one.

        Args:
            messages: the conversation.
            continue_final_message: end with the last message's text; not together with ``add_generation_prompt``.
            variables: what the client gives the template besides.
            options: more variables for the template, such as ``tools``, or others in the place of the usual ones.

        Raises:
            ChatTemplateError: the template refuses, or shows nothing of the message to be continued.
        """
        if reserved := _RESERVED.intersection(variables or ()):
            raise ChatTemplateError(f"the variable '{min(reserved)}' cannot be set")
        messages = list(messages)
        if continue_final_message:
            # As in transformers: the template is rendered whole, then cut where the message ends.
            messages[-1] = messages[-1] | {"content": messages[-1]["content"] + _END}
        usual = {"add_generation_prompt": True, "tools": None, "documents": None, **self._special_tokens}
        try:
            text = self._template.render({**usual, **(variables or {}), **options, "messages": messages})
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            raise ChatTemplateError(str(error)) from None
        return _up_to_end(text) if continue_final_message else text


def _up_to_end(text: str) -> str:
    before, found, rest = text.rpartition(_END.rstrip())
    if not found:
        raise ChatTemplateError("it shows nothing of the last message, so that it cannot be continued")
    # A template that trims messages has taken the mark's space away; it would have trimmed the message itself.
    return before if rest.startswith(" ") else before.rstrip()


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"):
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _raise(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return _ESCAPED_MARK.sub(lambda found: chr(int(found[2], 16)) if found[2] else found[0], text)
