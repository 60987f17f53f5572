"""``collm``, the command line: serve, and talk to a server.

    collm serve --config demo.toml
    collm complete "Question: ..."     collm chat     collm models     collm top     collm completion bash

Everything but ``serve`` is a client and knows the server by its HTTP API alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from server import __version__
from server.commands.chat import chat
from server.commands.complete import complete
from server.commands.completion import completion
from server.commands.models import models
from server.commands.top import top


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="collm")
def collm() -> None:
    """A base model and its experts, served as one.

    COLLM_URL names the server (default: http://127.0.0.1:8000), COLLM_API_KEY the key that it asks for.
    """


@collm.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def serve(options: tuple[str, ...]) -> None:
    """Serve a pair of models; takes the options of python -m server (collm serve --help)."""
    from server.cli import main as run_server

    sys.exit(run_server(list(options)))


for _command in (complete, chat, models, top, completion):
    collm.add_command(_command)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; ends the process with its exit status: 1 where something failed, 2 for wrong usage."""
    collm.main(args=None if argv is None else list(argv), prog_name="collm")
