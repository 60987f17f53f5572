"""``collm completion``: what a shell needs to complete commands, options and model names."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = {
    "bash": 'eval "$(collm completion bash)"        # in ~/.bashrc; bash 4.4 or newer',
    "zsh": 'eval "$(collm completion zsh)"         # in ~/.zshrc, after compinit',
    "fish": "collm completion fish | source         # in ~/.config/fish/config.fish",
}


@click.command(short_help="Print a script for the completion of a shell.", epilog="\b\n" + "\n".join(SHELLS.values()))
@click.argument("shell", type=click.Choice(list(SHELLS)))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script that makes SHELL complete commands, options and, from a running server, model names."""
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(ctx.find_root().command, {}, "collm", "_COLLM_COMPLETE").source())
