"""Back ends: what makes the lanes of a configuration. vLLM's is in :mod:`engine.vllm_hooks.backend`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, cast

from engine.compatibility import LaneVocabulary
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.grammar.checker import Templates
from engine.lanes.interface import Lane
from engine.lanes.shelf import Shelf
from engine.types import GateInfo, Relation


@dataclass(frozen=True)
class Loaded:
    """Lanes that are ready, and what they have in common.

    Attributes:
        lanes: the base's first, then the experts' in the order of the configuration.
        vocab_size: token ids of prompts are in [0, vocab_size).
        eos_token_ids: end a text, whoever writes them.
        gate: None where the pair has none.
        blend_obstacle: why the members' distributions cannot be combined, if they cannot.
        versions: of the software that computes, by package name.
        vocabularies: whether the members share one.
        spoken: by lane, the base's first; empty where all lanes write ``vocab_size`` tokens that nobody can spell.
        shelf: where the lanes leave their distributions, if it is not the one that they were given.
    """

    lanes: list[Lane]
    vocab_size: int
    eos_token_ids: list[int]
    gate: GateInfo | None
    blend_obstacle: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    vocabularies: Relation = "same"
    spoken: tuple[LaneVocabulary, ...] = ()
    shelf: Shelf | None = None


class Backend(Protocol):
    """The function ``load`` of a back end's module."""

    def __call__(
        self,
        config: EngineConfig,
        *,
        on_progress: Callable[[str], None],
        on_ready: Callable[[], None],
        on_failure: Callable[[str], None],
        templates: Templates | None,
        shelf: Shelf,
    ) -> Loaded:
        """Load the lanes of a configuration.

        Args:
            on_progress: called with one line at a time.
            on_ready: to be called from any thread when a lane has work that it had not before.
            on_failure: to be called from any thread with the name of a lane that cannot go on.
            templates: compiled forms, which the lanes share.
            shelf: where lanes leave their distributions for each other, for blends.

        Raises:
            CollmError: what does not fit, in one line.
        """
        ...


def backend(module: str) -> Backend:
    """The back end in a module.

    Raises:
        ConfigError: there is no such module, or it makes no lanes.
    """
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(f"backend: neither 'vllm' nor the name of a module: {error}") from error
    if not callable(getattr(found, "load", None)):
        raise ConfigError(f"backend: the module {module!r} has no function 'load'")
    return cast("Backend", found.load)
