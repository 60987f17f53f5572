"""Teacher-forced scores by the serving engine: as the model is served, with its shards, precision and adapter.

One lane serves the model, and scores each gold completion after its prompt. The lane's prefix cache keeps what prompts
have in common, so they go in their order. Of the base, the worker writes hidden states and features to disk itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from engine.config import EngineConfig, LaneConfig, RecordConfig, SchedulerConfig
from engine.errors import EngineDeadError, EngineStartupError
from engine.gates import FEATURES
from engine.offline import Engine
from engine.types import GenerationRequest, SamplingSpec
from engine.vllm_hooks.record import FEATURES_FILE, row_name
from training.data import TokenExample
from training.errors import TrainingError
from training.mapped import Table
from training.settings import EngineSettings


@dataclass(frozen=True)
class Numbered:
    """An example, and the row of its first gold token among those of the split."""

    tokens: TokenExample
    first: int


def numbered(examples: Sequence[TokenExample], starts: Sequence[int]) -> list[Numbered]:
    """Examples with their first rows; ``starts`` is of ``gold_tokens``."""
    return [Numbered(example, start) for example, start in zip(examples, starts, strict=False)]


class ServedScorer:
    """A running engine that scores with one model. Use it in a ``with`` statement.

    Args:
        model: folder of the model.
        adapter: of a LoRA adapter of it that is to be scored.
        name: "base" or the expert's, whose options in ``settings`` it gets.
        hidden: where the hidden states go; None for an expert.

    Raises:
        TrainingError: the engine refuses the model, in its own words.
    """

    def __init__(
        self, settings: EngineSettings, name: str, model: Path, adapter: Path | None, hidden: Table | None
    ) -> None:
        self._features: Table | None = None
        record = None
        if hidden is not None:
            folder = hidden.file.parent
            self._features = Table(folder / FEATURES_FILE, hidden.rows, len(FEATURES), torch.float32)
            dtype = str(hidden.dtype).removeprefix("torch.")
            record = RecordConfig.model_validate({"folder": str(folder), "rows": hidden.rows, "dtype": dtype})
        lane: dict[str, Any] = {**settings.lane(name), "backend": settings.backend, "model": str(model)}
        if adapter is not None:
            lane |= {**settings.lane("base"), "model": str(model), "adapter": str(adapter)}
        config = EngineConfig(
            base=LaneConfig.model_validate(lane),
            scheduler=SchedulerConfig(max_num_seqs=settings.max_num_seqs),
            record=record,
        )
        try:
            self._engine = Engine(config)
        except EngineStartupError as error:
            raise TrainingError(f"the engine does not start: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.shutdown()

    def __call__(self, shard: Sequence[Numbered]) -> dict[str, torch.Tensor]:
        """Score one shard: "logp", "top" and, of a base, "features", in the order of the examples.

        Raises:
            TrainingError: the engine fails, or refuses an example.
        """
        order = sorted(range(len(shard)), key=lambda number: shard[number].tokens.prompt)
        try:
            completions = self._engine.generate([self._request(shard[number]) for number in order])
        except EngineDeadError as error:
            raise TrainingError(f"the engine ended while it scored: {error}") from error
        logp: dict[int, list[float]] = {}
        top: dict[int, list[int]] = {}
        for number, completion in zip(order, completions, strict=True):
            if completion.prompt_logprobs is None:
                raise TrainingError(f"the engine does not score an example: {completion.error}")
            logp[number] = [entry.logprobs[0] for entry in completion.prompt_logprobs]
            top[number] = [entry.token_ids[1] for entry in completion.prompt_logprobs]
        found = {
            "logp": torch.tensor([value for number in range(len(shard)) for value in logp[number]]),
            "top": torch.tensor([token for number in range(len(shard)) for token in top[number]]),
        }
        if self._features is not None:
            first, last = shard[0].first, shard[-1].first + len(shard[-1].tokens.completion)
            found["features"] = self._features.opened()[first:last].clone()
        return found

    def _request(self, example: Numbered) -> GenerationRequest:
        tokens = example.tokens
        return GenerationRequest(
            row_name(example.first, len(tokens.prompt)),
            tokens.prompt + tokens.completion,
            SamplingSpec(temperature=0.0, prompt_logprobs=1),
            scores=True,
            score_from=len(tokens.prompt),
        )
