"""``collm complete``: continue a prompt."""

from __future__ import annotations

import sys
from typing import Any

import click

from server.commands.api import Api, CommandError
from server.commands.options import generation_options, request_of, server_options
from server.commands.paint import Painter

EXIT_INTERRUPTED = 130


@click.command(short_help="Continue a text.")
@click.argument("prompt", default="-")
@generation_options
@server_options
def complete(prompt: str, model: str | None, color: str, url: str, key: str | None, **fields: Any) -> None:
    r"""Continue PROMPT; without one, or with "-", what comes from the standard input.

    In a terminal the tokens of experts are coloured and underlined, and a last line tells who wrote how much. In a
    pipe there is the text and nothing else. A backslash and n in PROMPT are two characters: use $'...\n...'.
    """
    if prompt == "-" and sys.stdin.isatty():
        raise CommandError(
            "there is nothing to continue: give the beginning of a text (collm complete 'Once upon a time'), or hold a"
            " conversation with collm chat"
        )
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise CommandError("the prompt is empty; for a conversation there is collm chat")
    api = Api(url, key)
    body = request_of(model=model or api.joint_model(), **fields)
    try:
        Painter(color).paint(api.stream("/v1/completions", {**body, "prompt": text}))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
