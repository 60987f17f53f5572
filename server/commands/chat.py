"""``collm chat``: a conversation."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import click

from server.commands.api import Api, CommandError
from server.commands.options import generation_options, request_of, server_options
from server.commands.paint import Painter

HELP = """\
/reset           forget what was said
/system TEXT     begin anew with a system message
/threshold X     defer above X; without X, the gate's own
/policy NAME     who decides; without NAME, the gate's own
/exit            end (also Ctrl+D); Ctrl+C stops an answer"""


@click.command()
@click.option("--system", help="Begin with a system message.")
@generation_options
@server_options
def chat(system: str | None, model: str | None, color: str, url: str, key: str | None, **fields: Any) -> None:
    """Talk to a model that has a chat template. A line that begins with / is a command; /help lists them.

    From a pipe, every line is a message.
    """
    api = Api(url, key)
    body = request_of(model=model or api.joint_model(), **fields)
    talk = Talk(api, body, Painter(color), system)
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if line.strip():
                talk.say(line.strip())
        return
    with contextlib.suppress(ImportError):
        # Being imported, it gives input() line editing and history.
        import readline  # noqa: F401
    click.echo(f"{body['model']} at {api.url}; /help lists commands", err=True)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo()
            continue
        if line == "/exit":
            return
        try:
            talk.command(line) if line.startswith("/") else talk.say(line) if line else None
        except CommandError as error:
            error.show()


class Talk:
    """A conversation so far.

    Args:
        body: the request, without messages.
        system: the system message, or None.
    """

    def __init__(self, api: Api, body: dict[str, Any], painter: Painter, system: str | None) -> None:
        self._api = api
        self._body = body
        self._painter = painter
        self._messages: list[dict[str, str]] = []
        self._system = system
        self._reset()

    def say(self, text: str) -> None:
        """Send a message and show the answer. One that fails or is stopped is as if it had not been sent.

        Raises:
            CommandError: there is no answer.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        stream = self._api.stream("/v1/chat/completions", {**self._body, "messages": messages})
        try:
            answer = self._painter.paint(stream)
        except KeyboardInterrupt:
            click.echo("(stopped)", err=True)
            return
        self._messages = [*messages, {"role": "assistant", "content": answer}]

    def command(self, line: str) -> None:
        """Obey a line that begins with /.

        Raises:
            CommandError: there is no such command, or its argument is wrong.
        """
        name, _, argument = line[1:].partition(" ")
        argument = argument.strip()
        if name == "reset":
            self._reset()
        elif name == "system":
            self._system = argument or None
            self._reset()
        elif name == "policy":
            self._choose("policy", argument or None)
        elif name == "threshold":
            try:
                self._choose("threshold", float(argument) if argument else None)
            except ValueError:
                raise CommandError(f"{argument!r} is no number") from None
        elif name == "help":
            click.echo(HELP)
        else:
            raise CommandError(f"there is no command /{name}; /help lists them")

    def _reset(self) -> None:
        self._messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def _choose(self, field: str, value: str | float | None) -> None:
        chosen = {name: each for name, each in self._body["collaboration"].items() if name != field}
        self._body["collaboration"] = chosen if value is None else {**chosen, field: value}
