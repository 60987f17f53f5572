"""``collm check``: whether a configuration's models fit each other, without loading weights."""

from __future__ import annotations

import sys

import click

from server.commands.api import CommandError


@click.command(short_help="Say whether a pair can be served; loads no weights.")
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
def check(config: str) -> None:
    """Say whether a pair can be served: vocabularies, ends of text, gate and sizes. Loads no weights."""
    from engine.errors import CollmError
    from server.cli import ConfigurationError, load_settings

    try:
        settings = load_settings(["--config", config])
    except ConfigurationError as error:
        for line in error.lines:
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    from engine.check import report

    try:
        for line in report(settings.engine):
            print(line)
    except CollmError as error:
        raise CommandError(str(error)) from None
    print("the pair fits")
