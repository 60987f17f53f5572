"""Running choices: the engine's deltas become pieces of text. One generation request is one choice of one prompt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from engine.errors import CollmError, EngineDeadError
from engine.types import Delta, ErrorCode, GenerationRequest, TokenLogprobs
from server.choice import Choice
from server.engine_port import Engine
from server.errors import ApiError, engine_failure, invalid, request_failure
from server.text.pieces import Piece

_MERGE_AHEAD = 64
"""Pieces of concurrent choices that may wait for a slow reader; the engine's own queues hold the rest."""


async def pieces_of(engine: Engine, choice: Choice) -> AsyncGenerator[Piece, None]:
    """The pieces of one choice, the last of which has a finish_reason. Closing it early aborts the request.

    Raises:
        ApiError: the engine failed this request, or died.
        Exception: a defect of ours, which is logged and answered further out.
    """
    last: Delta | None = None
    failure: Exception | None = None
    outcome: str | None = "aborted"
    for observer in choice.observers:
        observer.begun()
    deltas = None if choice.request is None else engine.generate(choice.request)
    try:
        if deltas is None:
            outcome = "length"
            yield _noted(choice, Piece(finish_reason="length"))
            return
        scores = None if choice.scoring is None else await _scores(engine, choice, choice.scoring)
        async for last in deltas:
            piece = _piece_of(choice, last)
            if piece is None:
                continue
            if scores is not None:
                piece.prompt_logprobs, scores = scores, None
            if piece.finish_reason is not None:
                outcome = piece.finish_reason
            yield _noted(choice, piece)
            if piece.finish_reason is not None:
                return
        raise request_failure("The engine ended the request without a reason.")
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if engine.alive or task is None or task.cancelling():
            raise
        # Nobody cancelled us: what we waited for was torn down together with a dead engine.
        failure = engine_failure(EngineDeadError())
        raise failure from None
    except CollmError as error:
        failure = engine_failure(error)
        raise failure from error
    except Exception as error:
        failure = error
        raise
    finally:
        if isinstance(deltas, AsyncGenerator):
            # Where a stop string has matched, this is what makes the engine stop.
            await deltas.aclose()
        if failure is not None:
            # A request's own fault is not counted, no more than where it is found before the engine is asked.
            outcome = None if isinstance(failure, ApiError) and failure.status < 500 else "error"
        if outcome is not None:
            choice.meter.end(outcome)
        for observer in choice.observers:
            observer.ended(last, failure)


async def _scores(engine: Engine, choice: Choice, scoring: GenerationRequest) -> list[TokenLogprobs]:
    """The prompt's log-probabilities by the joint model.

    Raises:
        ApiError: the engine failed or refused the request.
    """
    scores: list[TokenLogprobs] = []
    deltas = engine.generate(scoring)
    try:
        async for delta in deltas:
            choice.scoring_cost = delta.cost
            _check(choice, delta)
            scores += delta.prompt_logprobs or []
    finally:
        if isinstance(deltas, AsyncGenerator):
            await deltas.aclose()
    return scores


def _piece_of(choice: Choice, delta: Delta) -> Piece | None:
    """What a delta adds to the text; None where that is not decided yet.

    Raises:
        ApiError: the engine failed or refused the request.
    """
    if delta.collaboration is not None:
        choice.meter.accepted(delta.collaboration)
        for observer in choice.observers:
            observer.accepted(delta.collaboration)
    if delta.cost is not None:
        choice.cost = delta.cost
        choice.meter.charged(delta.cost)
    _check(choice, delta)
    if choice.prompt_only:
        return Piece(prompt_logprobs=delta.prompt_logprobs or [], finish_reason="length")
    choice.meter.arrived(len(delta.tokens))
    return choice.builder.feed(delta)


def _check(choice: Choice, delta: Delta) -> None:
    if delta.refused:
        raise _refusal(delta, choice)
    if delta.finish_reason in ("error", "aborted"):
        raise request_failure(delta.error, delta.code)


def _noted(choice: Choice, piece: Piece) -> Piece:
    choice.meter.wrote(piece.sources, piece.deferrals)
    for observer in choice.observers:
        observer.wrote(piece)
    return piece


def _refusal(delta: Delta, choice: Choice) -> ApiError:
    message = delta.error or "The engine refused the request."
    if delta.code is ErrorCode.INVALID_GRAMMAR:
        return invalid(f"'{choice.grammar_param}': {message}.", choice.grammar_param, "invalid_structured_output")
    return invalid(message, delta.field)


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
    async with aclosing(pieces_of(engine, choice)) as pieces:
        async for piece in pieces:
            choice.piece.extend(piece)


async def merged(engine: Engine, choices: Sequence[Choice]) -> AsyncGenerator[tuple[Choice, Piece], None]:
    """The pieces of all choices as they come. Closing it early aborts them all.

    Raises:
        ApiError: a choice failed; the others are aborted.
    """
    if len(choices) == 1:
        choice = choices[0]
        async with aclosing(pieces_of(engine, choice)) as pieces:
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
        async with aclosing(pieces_of(engine, choice)) as pieces:
            async for piece in pieces:
                await queue.put((choice, piece))
    except Exception as error:
        await queue.put(error)
