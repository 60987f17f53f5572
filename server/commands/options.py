"""Options that commands share, and the request that they add up to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_args

import click
from click.shell_completion import CompletionItem

from engine.types import PolicyName
from server.commands.api import URL, Api, CommandError

F = TypeVar("F", bound=Callable[..., Any])


def _served_models(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of the models that the server serves, for the shell's completion; none if there is no server."""
    url = ctx.params.get("url") or URL
    try:
        names = [str(card["id"]) for card in Api(url, ctx.params.get("key")).models()]
    except CommandError:
        return []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def server_options(command: F) -> F:
    """Which server."""
    command = click.option(
        "--url", envvar="COLLM_URL", default=URL, show_default=True, show_envvar=True, is_eager=True,
        help="Address of the server.",
    )(command)  # fmt: skip
    return click.option("--key", envvar="COLLM_API_KEY", hidden=True, expose_value=True)(command)


def generation_options(command: F) -> F:
    """What is asked for: who writes, how much, how."""
    for option in reversed(_GENERATION):
        command = option(command)
    return command


_GENERATION: list[Callable[[Any], Any]] = [
    click.option(
        "-m", "--model", shell_complete=_served_models,
        help="Model; NAME/base or NAME/EXPERT for a member alone.  [default: the joint model]",
    ),
    click.option(
        "-p", "--policy", type=click.Choice(get_args(PolicyName)),
        help="Who decides which model writes a token.  [default: the gate's]",
    ),
    click.option(
        "-t", "--threshold", type=click.FloatRange(0, 1),
        help="An expert writes where its probability is greater.  [default: the gate's]",
    ),
    click.option("--rate", type=click.FloatRange(0, 1), help="Share of tokens that the policy random defers."),
    click.option("--max-expert-tokens", type=click.IntRange(0), help="After so many the base writes alone."),
    click.option(
        "-n", "--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="Most tokens to write.",
    ),
    click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True, help="0 is greedy."),
    click.option("--seed", type=int, help="Makes a drawn answer reproducible."),
    click.option("--stop", multiple=True, help="A string that ends the answer; may be given several times."),
    click.option(
        "--color", type=click.Choice(["auto", "always", "never"]), default="auto", show_default=True,
        help="Show who wrote what; auto: in a terminal, unless NO_COLOR is set.",
    ),
]  # fmt: skip


def request_of(
    *,
    model: str,
    policy: str | None,
    threshold: float | None,
    rate: float | None,
    max_expert_tokens: int | None,
    max_tokens: int,
    temperature: float,
    seed: int | None,
    stop: tuple[str, ...],
) -> dict[str, Any]:
    """A request's body, but for the prompt or the messages."""
    chosen = {"policy": policy, "threshold": threshold, "rate": rate, "max_expert_tokens": max_expert_tokens}
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "stream": True,
        "collaboration": {name: value for name, value in chosen.items() if value is not None} | {"report": True},
    }
    if seed is not None:
        body["seed"] = seed
    if stop:
        body["stop"] = list(stop)
    return body
