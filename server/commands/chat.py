"""``collm chat``: a conversation."""

from __future__ import annotations

import contextlib
import math
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
/share X         in its place: the share of the tokens that experts should write; without X, none
/cost X          in its place: seconds of the experts' steps per token that may be spent; without X, none
/policy NAME     who decides; without NAME, the server's default
/veto X          an expert less sure than X stands back; without X, the server's default
/regret X        take back what is held for wrong with more than X; without X, the server's default
/blend NAME      what is written where the experts are asked; without NAME, the expert's own token
/exit            end (also Ctrl+D); Ctrl+C stops an answer"""
_WHERE = ("threshold", "share", "cost")
"""Fields of ``collaboration`` that say where to defer, each in the place of the others."""


@click.command(short_help="Talk to a model that has a chat template.")
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
            self._choose("threshold", _number("threshold", argument) if argument else None)
        elif name == "share":
            self._choose("share", _number("share", argument) if argument else None)
        elif name == "cost":
            self._choose("cost", _number("cost", argument, math.inf) if argument else None)
        elif name == "veto":
            self._choose("veto", _number("veto", argument) if argument else None)
        elif name == "regret":
            self._choose("regret", _number("regret", argument) if argument else None)
        elif name == "blend":
            self._choose("blend", self._blend(argument) if argument else None)
        elif name == "help":
            click.echo(HELP)
        else:
            raise CommandError(f"there is no command /{name}; /help lists them")

    def _policy(self, name: str) -> str:
        policies = self._collaboration("policy")["policies"]
        if name not in policies:
            raise CommandError(f"this model has no policy {name!r}; it has {', '.join(policies)}")
        return name

    def _blend(self, name: str) -> str:
        blends = self._collaboration("blend")["blends"]
        if name not in blends:
            raise CommandError(f"this model has no blend {name!r}; it has {', '.join(blends)}")
        return name

    def _collaboration(self, field: str) -> dict[str, Any]:
        if self._served is None:
            raise CommandError(f"{self._body['model']} writes alone: it has no {field}")
        return self._served

    def _reset(self) -> None:
        self._messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def _in_force(self) -> dict[str, Any]:
        """The request's ``collaboration``: what says where to defer goes along only with a policy that has it."""
        chosen = dict(self._body["collaboration"])
        if self._served is not None:
            policy = chosen.get("policy", self._served["policy"])
            if policy not in self._served["thresholds"]:
                chosen.pop("threshold", None)
            if policy != "threshold":
                chosen.pop("share", None)
                chosen.pop("cost", None)
        return {"collaboration": chosen}

    def _choose(self, field: str, value: str | float | None) -> None:
        served = self._collaboration(field)
        # Of these, what was said last holds.
        gone = {field, *(_WHERE if field in _WHERE else ())}
        chosen = {name: each for name, each in self._body["collaboration"].items() if name not in gone}
        self._body["collaboration"] = chosen if value is None else {**chosen, field: value}
        in_force = self._in_force()["collaboration"]
        policy = in_force.get("policy", served["policy"])
        if policy not in served["thresholds"]:
            where = "which has no threshold"
        elif "share" in in_force:
            where = f"share {in_force['share']:g}"
        elif "cost" in in_force:
            where = f"cost {in_force['cost']:g}"
        else:
            where = f"threshold {in_force.get('threshold', served['thresholds'][policy]):g}"
        blend = f", blend {in_force['blend']}" if "blend" in in_force else ""
        veto = f", veto {in_force['veto']:g}" if "veto" in in_force else ""
        regret = f", regret {in_force['regret']:g}" if "regret" in in_force else ""
        _confirm(f"policy {policy}, {where}{veto}{regret}{blend}")


def _number(name: str, text: str, most: float = 1.0) -> float:
    try:
        number = float(text)
    except ValueError:
        raise CommandError(f"{text!r} is not a number") from None
    if not 0 <= number <= most or math.isinf(number):
        between = "between 0 and 1" if most == 1.0 else "0 or more"
        raise CommandError(f"a {name} is {between}, not {text}")
    return number


def _confirm(text: str) -> None:
    click.echo(text, err=True)
