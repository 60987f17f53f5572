"""One answer that is being written, and who is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engine.types import Collaboration, Cost, Delta, EngineInfo, GenerationRequest
from server.meters import RequestMeter
from server.text.pieces import Piece, PieceBuilder


class ChoiceObserver(Protocol):
    """Is told what becomes of a choice. What it does must not fail, and must not take long."""

    def begun(self) -> None:
        """The choice is about to be written."""
        ...

    def accepted(self, collaboration: Collaboration) -> None:
        """The engine has taken it, and this is in force, with every default filled in."""
        ...

    def wrote(self, piece: Piece) -> None:
        """A piece was written; its last one has a finish_reason."""
        ...

    def ended(self, last: Delta | None, failure: Exception | None) -> None:
        """Nothing more will be written.

        Args:
            last: the engine's last delta; None if there was none.
            failure: why it was not written to its end, unless it was cancelled.
        """
        ...


class RequestObserver(Protocol):
    """Is told of a request's choices."""

    def described(self, response_id: str, request: GenerationRequest, info: EngineInfo) -> None:
        """What was asked for; ``request`` is any of the response's choices."""
        ...

    def choice(self, index: int, prompt_index: int, request: GenerationRequest | None) -> ChoiceObserver:
        """An observer for one of them, which is going to be written."""
        ...


@dataclass(slots=True, eq=False)
class Choice:
    """One answer that is being written.

    Attributes:
        index: its number in the response.
        prompt_index: which of the request's prompts it continues.
        request: None where nothing has to be generated (echo alone).
        scoring: is asked first, where the prompt is scored by the joint model and then continued.
        grammar_param: the field that brought its grammar.
        prompt_only: the engine is asked for the prompt's logprobs; the token that it must write is dropped.
        piece: what was written, where the response is not streamed.
        cost: what it has taken so far, as the engine told last.
        scoring_cost: what scoring its prompt took, where it is scored by a request of its own.
    """

    index: int
    prompt_index: int
    request: GenerationRequest | None
    builder: PieceBuilder
    meter: RequestMeter
    observers: Sequence[ChoiceObserver] = ()
    prompt_only: bool = False
    grammar_param: str | None = None
    scoring: GenerationRequest | None = None
    piece: Piece = field(default_factory=Piece)
    cost: Cost | None = None
    scoring_cost: Cost | None = None
