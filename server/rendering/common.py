"""What completions and chat render alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from engine.blends import Blend
from engine.types import BLEND, NEGATIVE, TokenLogprobs
from server.choice import Choice
from server.protocol.responses import CollaborationReport, PromptLogprob, PromptLogprobs, Usage
from server.text.pieces import Piece
from server.text.tokenizer import TextTokenizer

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


@dataclass(frozen=True, slots=True)
class Head:
    """What every chunk of a response, and the whole one, says of itself.

    Attributes:
        created: seconds since 1970.
        model: as the client named it.
        fingerprint: of the served models and gate.
    """

    id: str
    created: int
    model: str
    fingerprint: str


class Renderer(Protocol):
    """Turns the pieces of one request into what is sent."""

    def chunks(self, choice: Choice, piece: Piece, usage: Usage | None) -> Sequence[msgspec.Struct]:
        """Stream chunks for a piece. ``usage`` is given where it goes with every chunk."""
        ...

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        """The stream's last chunk: no choices, the usage of the whole request."""
        ...

    def response(self, choices: Sequence[Choice], usage: Usage) -> msgspec.Struct:
        """The whole response; every choice's ``piece`` is complete."""
        ...


def report(piece: Piece, lane_names: Sequence[str], blend: Blend | None = None) -> CollaborationReport:
    """A piece's tokens with their sources and deferral probabilities.

    Args:
        blend: the request's, which says whose support a blended token has.
    """
    sources = ["blend" if source == BLEND else lane_names[source] for source in piece.sources]
    whole = CollaborationReport(piece.token_texts, sources, piece.deferrals)
    if blend is not None:
        names = (*lane_names, NEGATIVE)
        members = [names[lane] for lane in blend.effective().lanes]
        support: list[dict[str, float] | None] = [None] * len(sources)
        for number, values in piece.support:
            support[number] = {name: finite(value) for name, value in zip(members, values, strict=True)}
        whole.support = support
    return whole


def blend_of(choice: Choice) -> Blend | None:
    """The blend that a choice was asked with."""
    return None if choice.request is None else choice.request.collaboration.blend


class TokenNames:
    """How tokens are shown in logprobs.

    Args:
        as_ids: as ``token_id:N`` instead of their text, as vLLM's ``return_tokens_as_token_ids`` has it.
    """

    def __init__(self, tokenizer: TextTokenizer, *, as_ids: bool) -> None:
        self._text = tokenizer.token_text
        self._as_ids = as_ids

    def __call__(self, token: int) -> str:
        """The name of a token."""
        return f"token_id:{token}" if self._as_ids else self._text(token)


def prompt_logprobs(entries: Sequence[TokenLogprobs], tokenizer: TextTokenizer, count: int) -> PromptLogprobs:
    """The logprobs of a prompt's tokens.

    Args:
        entries: one for each token but the first.
        count: how many of the most probable ones to show at each position; there may be more.
    """
    shown: PromptLogprobs = [None]
    for entry in entries:
        ranked = list(enumerate(most_probable(entry)[:count], 1))
        found = {
            token: PromptLogprob(finite(logprob), rank, tokenizer.token_text(token))
            for rank, (token, logprob) in ranked
        }
        own = entry.token_ids[0]
        found.setdefault(own, PromptLogprob(finite(entry.logprobs[0]), entry.rank, tokenizer.token_text(own)))
        shown.append(found)
    return shown


def finite(logprob: float) -> float:
    """A logprob that JSON can hold."""
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB


def mean_logprob(piece: Piece) -> float:
    """By which ``best_of`` ranks."""
    if not piece.logprobs:
        return LOWEST_LOGPROB
    return sum(finite(entry.logprobs[0]) for entry in piece.logprobs) / len(piece.logprobs)


def most_probable(entry: TokenLogprobs) -> list[tuple[int, float]]:
    """The most probable (token, logprob) pairs of a position, without the written token's own entry."""
    return list(zip(entry.token_ids[1:], entry.logprobs[1:], strict=True))
