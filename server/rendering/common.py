"""What completions and chat render alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from engine.second_look import CHECK_BELOW, deserves_check
from engine.strategies.characters.requests import members
from engine.types import BLEND, NEGATIVE, Collaboration, TokenLogprobs
from server.choice import Choice
from server.protocol.responses import (
    CollaborationReport,
    PromptLogprob,
    PromptLogprobs,
    ReportedWord,
    Usage,
    WrittenPiece,
)
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


def report(
    piece: Piece, lane_names: Sequence[str], asked: Collaboration | None = None, *, check_below: float = CHECK_BELOW
) -> CollaborationReport:
    """A piece's tokens with their sources and deferral probabilities.

    Args:
        asked: by the request; says whose support a token has that several members wrote.
        check_below: see :func:`~engine.second_look.deserves_check`.
    """
    sources = ["blend" if source == BLEND else lane_names[source] for source in piece.sources]
    whole = CollaborationReport(piece.token_texts, sources, piece.deferrals)
    if asked is not None and asked.strategy == "characters":
        names = [lane_names[lane] for lane, _ in members(asked.weights, len(lane_names))]
        found = [
            {name: value for name, value in zip(names, values, strict=True) if not math.isnan(value)}
            for _, values in piece.support
        ]
        whole.support = list(found)
        whole.pieces = [
            WrittenPiece(text, start, end, heard, [name for name in names if name not in heard])
            for text, (start, end), heard in zip(piece.token_texts, piece.spans, found, strict=True)
        ]
    elif asked is not None and asked.blend is not None:
        all_names = (*lane_names, NEGATIVE)
        taking_part = [all_names[lane] for lane in asked.blend.effective().lanes]
        support: list[dict[str, float] | None] = [None] * len(sources)
        for number, values in piece.support:
            support[number] = {name: finite(value) for name, value in zip(taking_part, values, strict=True)}
        whole.support = support
    if asked is not None and asked.looks and len(piece.looks) == len(piece.tokens):
        whole.base_confidences = [look.base for look in piece.looks]
        whole.expert_confidences = [look.expert for look in piece.looks]
        whole.agreed = [look.agreed for look in piece.looks]
        supports, doubted = dict(piece.support), {*piece.vetoed, *piece.regretted}
        whole.check = [
            deserves_check(source, look, supports.get(number), doubted=number in doubted, below=check_below)
            for number, (source, look) in enumerate(zip(piece.sources, piece.looks, strict=True))
        ]
    if piece.vetoed:
        whole.vetoed = [number in set(piece.vetoed) for number in range(len(piece.tokens))]
    if piece.regretted:
        whole.regretted = [number in set(piece.regretted) for number in range(len(piece.tokens))]
    if piece.words:
        whole.words = [
            ReportedWord(word.start, word.length, lane_names[word.source], finite(word.logprob)) for word in piece.words
        ]
    return whole


def asked_of(choice: Choice) -> Collaboration | None:
    """How the members were asked to write a choice."""
    return None if choice.request is None else choice.request.collaboration


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
