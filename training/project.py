"""A training project: the settings, where each stage writes, and the data as the stages want it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from engine.adapters import is_adapter
from engine.checkpoints import TOKENIZER, Checkpoint
from engine.compatibility import compatibility
from engine.composed.artifact import Composition, is_composed
from engine.spelling.speller import Speller
from training.checkpoints import (
    check_models,
    device_of,
    expert_checkpoint,
    folder_of,
    load_expert,
    load_tokenizer,
    shared_vocabulary,
)
from training.data import Example, TokenExample, read_examples, tokenize
from training.engine_options import check_engine_options
from training.errors import SettingsError
from training.files import ContentHashes, hash_of_all
from training.graph import mode_of
from training.scoring import ModelScores
from training.settings import DataSettings, Method, Settings, Split, StrategyRow
from training.tracking import check_tracker

ONE_VOCABULARY: tuple[StrategyRow, ...] = ("mixture", "product")
"""Blends that are not defined over several."""


@dataclass(frozen=True)
class SplitData:
    """The examples of a split, their token ids, and a hash of both, whatever file and columns they come from."""

    examples: list[Example]
    tokens: list[TokenExample]
    fingerprint: str


@dataclass(frozen=True)
class BaseRef:
    """Which base: the user's, or the one that a run has trained.

    Attributes:
        run: name of that run's folder; None for the user's.
    """

    path: Path
    run: str | None = None


@dataclass
class Project:
    """Settings, and what follows from them. Nothing is loaded before it is needed."""

    settings: Settings
    scores: dict[Path, tuple[str, ModelScores]] = field(default_factory=dict)
    """Scores that were read, by their stage's folder, with its fingerprint."""
    _splits: dict[Split, SplitData] = field(default_factory=dict)
    _own_spellers: dict[str, Speller | None] = field(default_factory=dict)

    def check(self) -> None:
        """Look at all input before the first long stage.

        Raises:
            TrainingError: what is missing or does not fit, in one line.
        """
        check_models(self.settings)
        for split in self.splits:
            self.data(split)
        check_engine_options(self.settings.engine, ("base", *self.settings.expert_names), self.settings.out)
        check_tracker(self.settings)
        self._check_strategies()

    def _check_strategies(self) -> None:
        own = [name for name in self.expert_paths if self.own_speller(name) is not None]
        if self.settings.regret.ahead and own:
            raise SettingsError(f"regret.ahead: {own[0]} has a vocabulary of its own, and its words are not taken back")
        for row in self.settings.evaluate.strategies:
            if row in ONE_VOCABULARY and own:
                raise SettingsError(
                    f"evaluate.strategies: {row} is for members of one vocabulary, and {own[0]} has its own: "
                    "union and characters take several"
                )

    @property
    def splits(self) -> list[Split]:
        """The splits that the settings name."""
        named: list[Split] = ["train", "validation"]
        return [*named, "test"] if self.settings.data.test else named

    @cached_property
    def tokenizer(self) -> Any:
        """The base's, which experts may share."""
        return load_tokenizer(self.base)

    @cached_property
    def base_speller(self) -> Speller:
        """Of the base's vocabulary."""
        return Checkpoint(self.base).speller

    def own_speller(self, name: str) -> Speller | None:
        """Of an expert with a vocabulary of its own; None if it has the base's."""
        if name not in self._own_spellers:
            expert = expert_checkpoint(self.expert_paths[name], self.base)
            own = compatibility(Checkpoint(self.base), expert).relation != "same"
            self._own_spellers[name] = expert.speller if own else None
        return self._own_spellers[name]

    def tokenizer_of(self, name: str) -> Any:
        """An expert's own tokenizer."""
        return load_tokenizer(self.expert_paths[name])

    def own_template(self, name: str) -> Any | None:
        """The tokenizer by whose chat template an expert with the base's vocabulary reads conversations; None: it reads
        them by the base's. A base's name is none.
        """
        path = self.expert_paths.get(name)
        own = self.settings.data.chat_templates == "own" and path is not None and self.own_speller(name) is None
        if not own or path is None or not (path / TOKENIZER).is_file():
            return None
        tokenizer = load_tokenizer(path)
        return None if tokenizer.chat_template in (None, self.tokenizer.chat_template) else tokenizer

    @property
    def own_templates(self) -> dict[int, Any]:
        """By lane, the tokenizers of experts that have an :meth:`own_template`."""
        readers = {lane: self.own_template(name) for lane, name in enumerate(self.expert_paths, start=1)}
        return {lane: tokenizer for lane, tokenizer in readers.items() if tokenizer is not None}

    def tokens_of(self, split: Split, name: str) -> list[TokenExample]:
        """A split's examples as a member with the base's vocabulary reads them; others spell the base's.

        Raises:
            DataError: the member's chat template refuses a conversation.
        """
        data = self.data(split)
        tokenizer = self.own_template(name)
        if tokenizer is None:
            return data.tokens
        return [
            ids if example.conversation is None else replace(ids, prompt=example.prompt_ids(tokenizer))
            for example, ids in zip(data.examples, data.tokens, strict=True)
        ]

    @cached_property
    def vocabulary(self) -> int:
        """Size of the vocabulary that the base shares with experts; their heads may be padded beyond it."""
        return shared_vocabulary(self.settings).size

    @cached_property
    def device(self) -> torch.device:
        """Where PyTorch runs."""
        return device_of(self.settings.compute)

    @property
    def base(self) -> Path:
        """The base as the user gave it."""
        return folder_of(self.settings.base.model)

    @property
    def expert_paths(self) -> dict[str, Path]:
        """Name to folder, of a model or an adapter."""
        return {expert.name: folder_of(expert.source) for expert in self.settings.experts}

    def load_expert(self, name: str) -> PreTrainedModel:
        """An expert as a model of its own; an adapter in the weights that it adapts."""
        return load_expert(self.expert_paths[name], self.base, self.settings.compute.dtype, self.device)

    def hash_of_expert(self, name: str) -> str:
        """A hash of all that it is made of."""
        path = self.expert_paths[name]
        own = self.hash_of(path)
        return hash_of_all([own, self.hash_of(self.base)]) if is_adapter(path) else own

    def data(self, split: Split) -> SplitData:
        """A split's examples.

        Raises:
            TrainingError: the split is not named, or an example cannot be used.
        """
        if split not in self._splits:
            given = getattr(self.settings.data, split)
            if given is None:
                raise SettingsError(f"data.{split}: is needed for this stage")
            ends = Checkpoint(self.base).ends
            self._splits[split] = read_split(given, self.settings.data, self.tokenizer, split, ends)
        return self._splits[split]

    @cached_property
    def _hashes(self) -> ContentHashes:
        return ContentHashes(self.folder("hashes.json"))

    def hash_of(self, folder: Path) -> str:
        """A hash of a folder's content: a model, or a gate; of a composed checkpoint, of its members' content too."""
        own = self._hashes.of(folder)
        if not is_composed(folder):
            return own
        composition = Composition.load(folder)
        members = (composition.anchor, *composition.augmenting)
        return hash_of_all([own, *(self._hashes.of(member.path) for member in members)])

    # -- where things are -------------------------------------------------------------------------------------

    def folder(self, *parts: str) -> Path:
        """A folder below the output folder."""
        return self.settings.out.joinpath(*parts)

    def run(self, method: Method, seed: int) -> Path:
        """The folder of a training run."""
        return self.folder("train", f"{method}-{seed}")

    @property
    def user_base(self) -> BaseRef:
        """The base as the user gave it."""
        return BaseRef(self.base)

    def base_of(self, method: Method, seed: int) -> BaseRef:
        """The base that a run ends with: its own where the run trains one, else the user's."""
        if mode_of(self.settings, method) == "gate":
            return self.user_base
        run = self.run(method, seed)
        return BaseRef(run / "base", run.name)


def read_split(given: str, settings: DataSettings, tokenizer: Any, split: str, ends: Sequence[int]) -> SplitData:
    """The examples of a split that are not too long.

    Args:
        ends: ids that end a text when the base is served.

    Raises:
        DataError: an example cannot be used.
    """
    examples = read_examples(given, settings, split, tokenizer, ends)
    kept, tokens = tokenize(examples, tokenizer, settings.max_tokens)
    if len(kept) < len(examples):
        print(f"{given}: {len(examples) - len(kept)} examples longer than data.max_tokens are left out")
    return SplitData(kept, tokens, _fingerprint(kept, tokens))


def _fingerprint(examples: Sequence[Example], tokens: Sequence[TokenExample]) -> str:
    return hash_of_all(
        [example.prompt, example.completion, example.task, example.complete, ids.prompt, ids.completion]
        + ([] if example.conversation is None else [asdict(example.conversation)])
        for example, ids in zip(examples, tokens, strict=True)
    )
