"""Options that commands share, and the request that they add up to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_args

import click
from click.shell_completion import CompletionItem

from engine.types import PolicyName, StrategyName
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
        help="An expert writes where the deferral probability is greater.  [default: the gate's]",
    ),
    click.option(
        "--share", type=click.FloatRange(0, 1),
        help="In the place of --threshold: share of the tokens that experts should write.",
    ),
    click.option(
        "--cost", type=click.FloatRange(0),
        help="In the place of --threshold: seconds of the experts' steps per token that may be spent.",
    ),
    click.option("--rate", type=click.FloatRange(0, 1), help="Share of tokens that the policy random defers."),
    click.option("--max-expert-tokens", type=click.IntRange(0), help="After so many the base writes alone."),
    click.option(
        "--veto", type=click.FloatRange(0, 1),
        help="An expert that is less sure than this stands back for the base.  [default: the server's, usually 0]",
    ),
    click.option(
        "--regret", type=click.FloatRange(0, 1),
        help="An expert's token is taken back where the base, having read on, holds it for wrong with more than this "
        "probability.  [default: the server's, usually 1, which is never]",
    ),
    click.option(
        "--expert", "experts", multiple=True, metavar="NAME",
        help="An expert that may write; may be given several times.  [default: all]",
    ),
    click.option(
        "--blend", metavar="NAME",
        help="What is written where the experts are asked: mixture, union, proxy, contrastive, or a blend of the"
        " server's own.  [default: the expert's own token]",
    ),
    click.option(
        "--strategy", type=click.Choice(get_args(StrategyName)),
        help="How the members write together.  [default: the server's]",
    ),
    click.option(
        "-n", "--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="Most tokens to write.",
    ),
    click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True, help="0 is greedy."),
    click.option(
        "--top-p", type=click.FloatRange(0, 1, min_open=True),
        help="Draw from the most probable tokens that add up to this much.",
    ),
    click.option("--seed", type=int, help="Makes a drawn answer reproducible."),
    click.option("--stop", multiple=True, help="A string that ends the answer; may be given several times."),
    click.option(
        "--color", type=click.Choice(["auto", "always", "never"]), default="auto", show_default=True,
        help="Show who wrote what; auto: in a terminal, unless NO_COLOR is set.",
    ),
]  # fmt: skip


COLLABORATION = (
    "policy", "threshold", "share", "cost", "rate", "max_expert_tokens", "veto", "regret", "experts", "blend",
    "strategy",
)  # fmt: skip
"""Options that are fields of ``collaboration``."""


def request_of(*, model: str, **options: Any) -> dict[str, Any]:
    """A request's body, but for the prompt or the messages.

    Args:
        options: those of ``generation_options``; None or () for what was not given.
    """
    given = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in options.items()
        if value is not None and value != ()
    }
    collaboration = {name: given.pop(name) for name in COLLABORATION if name in given}
    return {"model": model, "stream": True, **given, "collaboration": {**collaboration, "report": True}}
