"""``collm``, the command line: the one door to everything.

    collm serve --config demo.toml
    collm complete "Question: ..."     collm chat     collm models     collm top     collm completion bash
    collm check demo.toml     collm train pipeline --config project.toml     collm convert     collm bench

``serve``, ``train``, ``convert`` and ``bench`` pass their options on to the package that does the work; the others are
clients and know the server by its HTTP API alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

import click

from server import __version__
from server.commands.api import CommandError
from server.commands.chat import chat
from server.commands.check import check
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


@collm.command(
    short_help="Serve a pair of models.",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def serve(options: tuple[str, ...]) -> None:
    """Serve a pair of models; collm serve --help lists the options."""
    from server.cli import main as run_server

    if not options and not any(name.upper().startswith(("COLLM_CONFIG", "COLLM_BASE__")) for name in os.environ):
        raise CommandError(
            "say which pair: collm serve --config FILE (the demo pair: deploy/config/demo.toml in the repository), or"
            ' two models: collm serve --base.model FOLDER --experts \'[{"name": "expert", "model": "FOLDER"}]\''
        )
    sys.exit(run_server(list(options)))


def _door(name: str, module: str, arguments: Sequence[str], summary: str) -> None:
    """A command that runs a package's own command line in this process's place.

    The client commands must not import torch, and packages of the engine's side must not be imported by the server's.
    """

    def run(options: tuple[str, ...]) -> None:
        # -P: nothing of the current folder is imported.
        os.execv(sys.executable, [sys.executable, "-P", "-m", module, *arguments, *options])

    run.__doc__ = f"{summary}; collm {name} --help lists the options."
    passed_on: Callable[..., None] = click.argument("options", nargs=-1, type=click.UNPROCESSED)(run)
    settings = {"ignore_unknown_options": True, "allow_extra_args": True}
    collm.command(name, short_help=f"{summary}.", add_help_option=False, context_settings=settings)(passed_on)


_door("train", "training", (), "Train a gate for a pair")
_door("convert", "training", ("convert",), "Convert a pair to and from the reference format")
_door("bench", "bench", (), "Measure performance")

for _command in (check, complete, chat, models, top, completion):
    collm.add_command(_command)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; ends the process with its exit status: 1 where something failed, 2 for wrong usage."""
    collm.main(args=None if argv is None else list(argv), prog_name="collm")
