"""Running choices: the engine's deltas become pieces of text. One generation request is one choice of one prompt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from engine.errors import CollmError, EngineDeadError
from engine.types import GRAMMAR_AT_FAULT, Delta, GenerationRequest
from server.engine_port import Engine
from server.errors import ApiError, engine_failure, invalid, request_failure
from server.metrics import RequestMeter
from server.text.pieces import Piece, PieceBuilder
from server.tracing import current_trace

_MERGE_AHEAD = 64
"""Pieces of concurrent choices that may wait for a slow reader; the engine's own queues hold the rest."""


@dataclass(slots=True, eq=False)
class Choice:
    """One answer that is being written.

    Attributes:
        index: its number in the response.
        prompt_index: which of the request's prompts it continues.
        request: None where nothing has to be generated (echo alone).
        grammar_param: the field that brought its grammar.
        prompt_only: the engine is asked for the prompt's logprobs; the token that it must write is dropped.
        timeline: of its last delta.
        on_end: called once nothing more will be written of it.
    """

    index: int
    prompt_index: int
    request: GenerationRequest | None
    builder: PieceBuilder
    meter: RequestMeter
    prompt_only: bool = False
    grammar_param: str | None = None
    piece: Piece = field(default_factory=Piece)
    timeline: list[float] | None = None
    on_end: Callable[[], None] | None = None


def write(engine: Engine, choice: Choice) -> AsyncGenerator[Piece, None]:
    """The pieces of one choice, the last of which has a finish_reason. Closing it early aborts the request.

    Raises:
        ApiError: the engine failed this request, or died.
        Exception: a defect of ours, which is logged and answered further out.
    """
    trace = current_trace()
    pieces = _write(engine, choice)
    return pieces if trace is None else trace.watch(engine.info, choice, pieces)


async def _write(engine: Engine, choice: Choice) -> AsyncGenerator[Piece, None]:
    if choice.request is None:
        choice.meter.end("length")
        _ended(choice)
        yield Piece(finish_reason="length")
        return
    builder, meter = choice.builder, choice.meter
    outcome: str | None = "aborted"
    delta: Delta | None = None
    deltas = engine.generate(choice.request)
    try:
        async for delta in deltas:
            if delta.refused:
                raise _refusal(delta, choice)
            if delta.finish_reason in ("error", "aborted"):
                raise request_failure(delta.error)
            if choice.prompt_only:
                outcome = "length"
                yield Piece(prompt_logprobs=delta.prompt_logprobs or [], finish_reason="length")
                return
            meter.arrived(len(delta.tokens))
            piece = builder.feed(delta)
            if piece is None:
                continue
            meter.wrote(piece.sources, piece.deferrals)
            if piece.finish_reason is not None:
                outcome = piece.finish_reason
            yield piece
            if builder.finished:
                return
        raise request_failure("The engine ended the request without a reason.")
    except ApiError as error:
        # A request's own fault is not counted, no more than where it is found before the engine is asked.
        outcome = "error" if error.status >= 500 else None
        raise
    except CollmError as error:
        outcome = "error"
        raise engine_failure(error) from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if engine.alive or task is None or task.cancelling():
            raise
        # Nobody cancelled us: what we waited for was torn down together with a dead engine.
        outcome = "error"
        raise engine_failure(EngineDeadError()) from None
    except Exception:
        outcome = "error"
        raise
    finally:
        if isinstance(deltas, AsyncGenerator):
            # Where a stop string has matched, this is what makes the engine stop.
            await deltas.aclose()
        if outcome is not None:
            meter.end(outcome)
        _ended(choice)
        if delta is not None:
            choice.timeline = delta.timeline


def _refusal(delta: Delta, choice: Choice) -> ApiError:
    message = delta.error or "The engine refused the request."
    return invalid(message, choice.grammar_param if message.startswith(GRAMMAR_AT_FAULT) else None)


def _ended(choice: Choice) -> None:
    if choice.on_end is not None:
        choice.on_end()


async def collect(engine: Engine, choices: Sequence[Choice]) -> None:
    """Write all choices to their end, into ``choice.piece``. If one fails, the others are aborted.

    Raises:
        ApiError: the first failure.
    """
    if len(choices) == 1:
        await _collect(engine, choices[0])
        return
    try:
        async with asyncio.TaskGroup() as group:
            for choice in choices:
                group.create_task(_collect(engine, choice))
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def _collect(engine: Engine, choice: Choice) -> None:
    async with aclosing(write(engine, choice)) as pieces:
        async for piece in pieces:
            choice.piece.extend(piece)


async def merged(engine: Engine, choices: Sequence[Choice]) -> AsyncGenerator[tuple[Choice, Piece], None]:
    """The pieces of all choices as they come. Closing it early aborts them all.

    Raises:
        ApiError: a choice failed; the others are aborted.
    """
    if len(choices) == 1:
        choice = choices[0]
        async with aclosing(write(engine, choice)) as pieces:
            async for piece in pieces:
                yield choice, piece
        return
    queue: asyncio.Queue[tuple[Choice, Piece] | Exception] = asyncio.Queue(_MERGE_AHEAD)
    tasks = [asyncio.create_task(_forward(engine, choice, queue)) for choice in choices]
    try:
        unfinished = len(choices)
        while unfinished:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item[1].finish_reason is not None:
                unfinished -= 1
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forward(engine: Engine, choice: Choice, queue: asyncio.Queue[tuple[Choice, Piece] | Exception]) -> None:
    try:
        async with aclosing(write(engine, choice)) as pieces:
            async for piece in pieces:
                await queue.put((choice, piece))
    except Exception as error:
        await queue.put(error)
