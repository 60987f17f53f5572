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
/reset           start a new conversation
/system TEXT     start a new conversation with a system message; without TEXT, with none
/threshold X     defer above X; without X, the server's default
/policy NAME     who decides; without NAME, the server's default
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
    cards = {str(card["id"]): card for card in api.models()}
    body = request_of(model=model or next(iter(cards)), **fields)
    talk = Talk(api, body, Painter(color), system, cards.get(body["model"], {}).get("collaboration"))
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
        served: the model's ``collaboration`` as /v1/models has it; None for a member alone.
    """

    def __init__(
        self, api: Api, body: dict[str, Any], painter: Painter, system: str | None, served: dict[str, Any] | None
    ) -> None:
        self._api = api
        self._body = body
        self._painter = painter
        self._messages: list[dict[str, str]] = []
        self._system = system
        self._served = served
        self._reset()

    def say(self, text: str) -> None:
        """Send a message and show the answer. One that fails or is stopped is as if it had not been sent.

        Raises:
            CommandError: there is no answer.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        stream = self._api.stream("/v1/chat/completions", {**self._body, "messages": messages, **self._in_force()})
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
            _confirm("a new conversation")
        elif name == "system":
            self._system = argument or None
            self._reset()
            _confirm(
                "a new conversation "
                + (f"with the system message {argument!r}" if argument else "without a system message")
            )
        elif name == "policy":
            self._choose("policy", self._policy(argument) if argument else None)
        elif name == "threshold":
            self._choose("threshold", _threshold(argument) if argument else None)
        elif name == "help":
            click.echo(HELP)
        else:
            raise CommandError(f"there is no command /{name}; /help lists them")

    def _policy(self, name: str) -> str:
        policies = self._collaboration("policy")["policies"]
        if name not in policies:
            raise CommandError(f"this model has no policy {name!r}; it has {', '.join(policies)}")
        return name

    def _collaboration(self, field: str) -> dict[str, Any]:
        if self._served is None:
            raise CommandError(f"{self._body['model']} writes alone: it has no {field}")
        return self._served

    def _reset(self) -> None:
        self._messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def _in_force(self) -> dict[str, Any]:
        """The request's ``collaboration``: a threshold goes along only with a policy that has one."""
        chosen = dict(self._body["collaboration"])
        if self._served is not None and chosen.get("policy", self._served["policy"]) not in self._served["thresholds"]:
            chosen.pop("threshold", None)
        return {"collaboration": chosen}

    def _choose(self, field: str, value: str | float | None) -> None:
        served = self._collaboration(field)
        chosen = {name: each for name, each in self._body["collaboration"].items() if name != field}
        self._body["collaboration"] = chosen if value is None else {**chosen, field: value}
        policy = self._body["collaboration"].get("policy", served["policy"])
        threshold = self._body["collaboration"].get("threshold", served["thresholds"].get(policy))
        if policy not in served["thresholds"]:
            _confirm(f"policy {policy}, which has no threshold")
        else:
            _confirm(f"policy {policy}, threshold {threshold:g}")


def _threshold(text: str) -> float:
    try:
        threshold = float(text)
    except ValueError:
        raise CommandError(f"{text!r} is not a number") from None
    if not 0 <= threshold <= 1:
        raise CommandError(f"a threshold is between 0 and 1, not {text}")
    return threshold


def _confirm(text: str) -> None:
    click.echo(text, err=True)
