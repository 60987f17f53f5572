"""All settings of a composition's training, as one typed, frozen model read from TOML. Unknown keys are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from training.settings import BaseSettings, ComputeSettings, DataSettings, EngineSettings, Section, Seed, check_lane

Control = Literal["random", "lora"]


class AugmentingSettings(BaseSettings):
    """A frozen model that the anchor reads. It shares the anchor's tokenizer."""

    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")
    """Its name in the composition."""


class ConnectionSettings(Section):
    """One cross-attention, by hand."""

    augmenting: str
    """Name of the augmenting model."""
    layer: int = Field(ge=1)
    """Its states after this layer are read."""
    into: int = Field(ge=1)
    """They are added to the anchor's states after this layer."""


class ConnectSettings(Section):
    """Where the models are connected, and how."""

    count: int = Field(default=2, ge=1)
    """Connections per augmenting model, evenly spaced, where none are given by hand. The paper has one for every four
    layers of the augmenting model."""
    connections: tuple[ConnectionSettings, ...] = ()
    """By hand instead."""
    heads: int | None = Field(default=None, ge=1)
    """Query heads; None: as many as the anchor has, as in the paper."""
    kv_heads: int | None = Field(default=None, ge=1)
    """Key and value heads; None: as many as query heads. Fewer make the KV cache smaller by as much."""
    head_size: int | None = Field(default=None, ge=1)
    """None: the anchor's hidden size divided by ``heads``."""
    normalize: bool = False
    """Divide both models' states by the root of their mean squares before a connection. Not in the paper; makes one
    learning rate fit models whose states differ in size."""


class TrainSettings(Section):
    """How the connections learn. The paper gives no learning rate; the other values are usual ones."""

    learning_rate: float = Field(default=3e-4, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warm_up: float = Field(default=0.04, ge=0, le=1)
    """Share of the steps in which the learning rate rises; then it falls to zero linearly."""
    epochs: int = Field(default=10, ge=1)
    batch_size: int = Field(default=32, ge=1)
    """Examples per step."""
    micro_batch_size: int = Field(default=16, ge=1)
    """Examples per forward pass; gradients are summed up to a step."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    evaluate_every: int = Field(default=100, ge=1)
    """Steps between looks at the validation loss. The best connections are kept."""
    patience: int = Field(default=5, ge=1)
    """Looks without improvement after which training ends."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Steps between checkpoints."""
    gradient_checkpointing: bool = False
    """Compute the anchor's layers twice instead of keeping their activations: for large anchors."""


class EvaluateSettings(Section):
    """The table."""

    controls: tuple[Control, ...] = ()
    """What else is trained and asked. "random": the same composition with augmenting models of random weights.
    "lora": no composition, but a LoRA adapter of the anchor with about as many parameters (needs ``peft``)."""
    control_seeds: int | None = Field(default=None, ge=1)
    """Only so many of the seeds, the first ones, have controls."""
    limit: int | None = Field(default=None, ge=1)
    """Only so many questions, spread evenly."""
    room: int = Field(default=16, ge=1)
    """An answer may have so many tokens more than the gold completion."""


class ComposeSettings(Section):
    """A composition to be trained."""

    out: Path
    """Folder of everything that the stages write."""
    seeds: tuple[Seed, ...] = Field(default=(0,), min_length=1)
    """One training each. The composition to be served is that of the first."""
    anchor: BaseSettings
    augmenting: tuple[AugmentingSettings, ...] = Field(min_length=1)
    data: DataSettings
    compute: ComputeSettings = ComputeSettings()
    connect: ConnectSettings = ConnectSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    engine: EngineSettings = EngineSettings()

    def controls(self, seed: int) -> tuple[Control, ...]:
        """What else is trained with this seed."""
        return self.evaluate.controls if seed in self.seeds[: self.evaluate.control_seeds] else ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [model.name for model in self.augmenting]
        for name in names:
            if name in ("base", "anchor") or names.count(name) > 1:
                raise ValueError(f"augmenting.name: {name!r} is taken")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds: one is there twice")
        # What would be heeded nowhere.
        if self.compute.dtype != "float32":
            raise ValueError("compute.dtype: connections learn in float32, and so are the members read")
        if self.data.chat_templates != "base":
            raise ValueError("data.chat_templates: all members read the same tokens, by the anchor's chat template")
        if self.engine.lanes:
            raise ValueError("engine.lanes: the composition and its members are asked with the same options")
        check_lane("anchor", self.engine.lane("anchor"))
        return self
