"""``collm models``: what is served."""

from __future__ import annotations

import sys

import click
from rich.console import Console
from rich.table import Table

from server.commands.api import Api
from server.commands.options import server_options


@click.command(short_help="List the served models.")
@server_options
def models(url: str, key: str | None) -> None:
    """List the served models: the joint one, each member alone, and blends under names of their own.

    In a pipe: a line for each with name, context length and what it is, between tabs.
    """
    rows = []
    for card in Api(url, key).models():
        name, parent = str(card["id"]), card.get("parent")
        kind = "joint"
        if parent is not None:
            kind = (
                f"{name.removeprefix(f'{parent}/')} alone" if name.startswith(f"{parent}/") else "joint, with a blend"
            )
        rows.append((name, str(card.get("max_model_len") or "not loaded"), kind))
    if not sys.stdout.isatty():
        for row in rows:
            click.echo("\t".join(row))
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("model", "context", ""):
        table.add_column(heading)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)
