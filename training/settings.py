"""All settings of a training project, as one typed, frozen model read from TOML. Unknown keys are errors.

Defaults are the reference's (arXiv 2403.03870 and its code) where it has one; else they say why.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.config import LaneConfig
from engine.hindsight import LONGEST_AHEAD
from training.errors import SettingsError

FEATURES = ("entropy", "margin", *(f"logprob_{rank}" for rank in range(1, 6)))
"""``engine.gates.FEATURES``, which is not imported: wrong settings are found before torch is loaded."""


def _known(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in FEATURES or names.count(name) > 1:
            raise ValueError(f"{name!r} is there twice, or is none of {', '.join(FEATURES)}")
    return names


Features = Annotated[tuple[str, ...], AfterValidator(_known)]
_S = TypeVar("_S", bound="Section")
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What all libraries take, also multiplied by a million for the draws of single steps and questions."""
Method = Literal["collm", "weak", "finetuned"]
Split = Literal["train", "validation", "test"]
StrategyRow = Literal["veto", "mixture", "product", "union", "characters"]


class Section(BaseModel):
    """A table of settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class BaseSettings(Section):
    """The base model."""

    model: str = Field(min_length=1)
    """Folder of a Hugging Face causal language model with safetensors weights, or its name on a hub."""


class ExpertSettings(Section):
    """A frozen expert with the base's tokenizer: a model, or a LoRA adapter of the base's weights as they came."""

    model: str | None = Field(default=None, min_length=1)
    """Folder of a Hugging Face causal language model with safetensors weights, or its name on a hub."""

    adapter: str | None = Field(default=None, min_length=1)
    """Folder of a LoRA adapter of the base, or its name on a hub, instead of a model."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Its name in the gate, in the server's configuration and as the source of its tokens."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.model is None) == (self.adapter is None):
            raise ValueError("give either model or adapter")
        return self

    @property
    def source(self) -> str:
        """Where the model or the adapter is."""
        return self.model or self.adapter or ""


class DataSettings(Section):
    """Prompts and gold completions, or conversations. Each split is the path of a JSONL file or of a folder that
    ``datasets`` saved to disk, or "hub:NAME", "hub:NAME:CONFIG" or "hub:NAME:CONFIG@SPLIT" for a data set on a hub, as
    ``datasets.load_dataset`` takes them; the split of that name is read where none is given.
    """

    train: str
    validation: str
    """The threshold is chosen on it."""
    test: str | None = None
    """Only ever used to evaluate."""
    streaming: bool = False
    """Read data sets on a hub as they come, instead of fetching them first."""
    max_examples: int | None = Field(default=None, ge=1)
    """Only the first so many rows of each split."""
    prompt: str = "prompt"
    """Column of the prompt, taken as it is, without a chat template."""
    completion: str = "completion"
    """Column of the gold completion. The end-of-sequence token is added."""
    messages: str = "messages"
    """Column of a conversation, as OpenAI's API has it, in rows without a prompt. Each of the assistant's turns is an
    example: the prompt is what the base's chat template writes of the turns before. An expert with a vocabulary of its
    own reads them by its own template, as when the pair is served. A column ``tools`` goes to the template too."""
    answers: Literal["all", "last"] = "all"
    """Which of the assistant's turns are learned and asked."""
    system: str | None = Field(default=None, min_length=1)
    """System prompt of conversations that have none."""
    chat_templates: Literal["base", "own"] = "base"
    """By whose chat template an expert with the base's vocabulary reads a conversation, as ``server.chat_templates`` of
    the pair: the base's, or "own": the one that comes with its tokenizer, if one does."""
    template: dict[str, Any] = Field(default_factory=dict)
    """More variables for chat templates, e.g. { enable_thinking = false }."""
    task: str = "task"
    """Column by which scores are listed, if it is there."""
    complete: str = "complete"
    """Column, if it is there, that is false where the completion is only the start of one: no end is learned, and an
    answer that starts so is right."""
    max_tokens: int = Field(default=1024, ge=2)
    """Longer examples, prompt and completion together, are left out and counted."""


class ComputeSettings(Section):
    """Where and how the models run in PyTorch. (The serving engine has settings of its own.)"""

    device: str = "auto"
    """PyTorch's name of the device; "auto" is cuda where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of models that are only read; for what is trained, see train.joint.dtype."""
    threads: int | None = Field(default=None, ge=1)
    """Threads on a CPU; None is PyTorch's choice."""


class ScoreSettings(Section):
    """Teacher-forced scoring, cached on disk."""

    by: Literal["transformers", "engine"] = "transformers"
    """Who scores. "engine": the serving engine, one lane per model, with the options of ``[engine]``: shards, executor,
    quantisation. Experts with vocabularies of their own are scored by transformers either way."""
    batch_size: int = Field(default=16, ge=1)
    """Examples a forward pass of transformers."""
    shard: int = Field(default=512, ge=1)
    """Examples a file; what an interruption can cost at most."""
    hidden: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the base's hidden states on disk. "auto": ``compute.dtype``, which loses nothing."""


class GateSettings(Section):
    """What the gate is, and how its inputs are scaled while it learns."""

    kind: Literal["linear", "mlp"] = "linear"
    """"linear": the method's vector per expert. "mlp": a hidden layer before it; needs train.mode = "gate"."""
    width: int = Field(default=64, ge=1)
    """Units of the hidden layer of an "mlp"."""
    features: Features = ()
    """What the gate reads of the base's own distribution beside the hidden state: of "entropy", "margin" and
    "logprob_1" to "logprob_5". Needs train.mode = "gate"."""
    standardise: bool = True
    """Learn on inputs of mean 0 and variance 1, so that learning rates and weight decay mean the same for any base; the
    scale is folded into the gate that is saved. False: on the inputs as they are, from the mean of the LM head's rows,
    as the reference does."""


class InitSettings(Section):
    """Weak supervision of the gate, the base frozen: where all training starts."""

    positive_weight: float = Field(default=8.0, gt=0)
    learning_rate: float = Field(default=1e-2, gt=0)
    """The reference has 2e-5 for full models; the gate alone, on cached states, wants more."""
    weight_decay: float = Field(default=1e-2, ge=0)
    steps: int = Field(default=1000, ge=1)
    """Steps on all tokens at once, or on ``batch_tokens`` of them."""
    batch_tokens: int = Field(default=65536, ge=1)


class GateOnlySettings(Section):
    """train.mode = "gate": the gate on cached hidden states, the base frozen."""

    learning_rate: float = Field(default=1e-2, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    epochs: int = Field(default=20, ge=1)
    batch_tokens: int = Field(default=8192, ge=1)
    cost: float = Field(default=0.0, ge=0)
    """Cost of a deferral, added to the marginal likelihood's loss, in nats per unit of deferral probability. 0 is the
    reference's loss. With a frozen base a cost keeps the gate from deferring wherever the expert is a little surer."""


class LoraSettings(Section):
    """Low-rank adapters instead of full training of the base; merged into it when saved. Needs ``peft``."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: str | tuple[str, ...] = "all-linear"
    """Names of modules as peft takes them."""


class JointSettings(Section):
    """train.mode = "joint", and the fine-tuned base: the base's weights learn too."""

    learning_rate: float = Field(default=2e-5, gt=0)
    theta_learning_rate: float | None = Field(default=None, gt=0)
    """None: the same."""
    weight_decay: float = Field(default=0.0, ge=0)
    epochs: int = Field(default=2, ge=1)
    batch_size: int = Field(default=128, ge=1)
    """Examples a step."""
    micro_batch_size: int = Field(default=16, ge=1)
    """Examples a forward pass, or rows of several with ``packing``; gradients are summed up to a step."""
    packing: bool = False
    """Put several examples into a row, as long as the longest one of the step, each seen by itself: less padding where
    lengths differ much. Only for a base whose attention can keep them apart, which is looked at first."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the base's gradient."""
    cost: float = Field(default=0.0, ge=0)
    """As in train.gate."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of what is computed, of weights that do not learn (with LoRA), and of the base that is saved. What
    learns, its gradients and AdamW's moments are float32 always: bfloat16 loses steps as small as these."""
    gradient_checkpointing: bool = False
    """Compute each layer twice instead of keeping its activations: for large bases, or long texts."""
    lora: LoraSettings | None = None


class TrainSettings(Section):
    """Which runs are trained, and how."""

    mode: Literal["gate", "joint"] = "gate"
    """"gate": theta alone, minutes. "joint": base and theta by the marginal likelihood, as the paper does."""
    methods: tuple[Method, ...] = ("collm",)
    """"collm": marginal likelihood. "weak": weakly supervised baseline. "finetuned": the base alone, for comparison."""
    warm_up: float = Field(default=0.04, ge=0, le=1)
    """Share of the steps in which the learning rate rises; then it falls to zero linearly."""
    bias: bool = False
    """The reference has none."""
    weak_positive_weight: float = Field(default=5.0, gt=0)
    checkpoint_every: int = Field(default=50, ge=1)
    """Steps between checkpoints."""
    gate: GateOnlySettings = GateOnlySettings()
    joint: JointSettings = JointSettings()


class RolloutSettings(Section):
    """Learning from answers that the trained gate draws, graded as in the evaluation: see training.rollouts."""

    rounds: int = Field(default=0, ge=0)
    """Each starts the engine with the gate as it is by then. 0: the gate stays as it was trained."""
    questions: int = Field(default=512, ge=1)
    """Training questions a round."""
    samples: int = Field(default=4, ge=2)
    """Answers to each."""
    cost: float = Field(default=0.002, ge=0)
    """Taken off an answer's grade, 1 or 0, for each token that an expert writes."""
    learning_rate: float = Field(default=2e-2, gt=0)
    steps: int = Field(default=32, ge=1)
    """A round."""
    answers: int = Field(default=512, ge=1)
    """A step."""
    clip: float = Field(default=0.2, gt=0)
    """Largest change of a decision's probability, as a part of it, that a round rewards."""


class CalibrateSettings(Section):
    """The choice of the threshold, by decoding on the serving engine."""

    rates: tuple[float, ...] = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)
    """Nominal deferral rates; the thresholds are the quantiles that give them."""
    refine: int = Field(default=3, ge=0)
    """Rounds of two more thresholds each, halfway from the best one to its neighbours."""
    target_rate: float | None = Field(default=None, ge=0, le=1)
    """Choose the threshold whose measured deferral rate is nearest to this; None: by the score."""
    noise: float = Field(default=1.0, ge=0)
    """Among thresholds whose scores are below the best by at most so many standard errors of the difference, question
    by question, the one with the lowest deferral rate is chosen. 0: the best score, whatever it costs."""
    limit: int | None = Field(default=None, ge=1)
    """Only so many questions, spread evenly."""


class RegretSettings(Section):
    """Taking an expert's token back once the base has read on behind it: see training.regret."""

    ahead: int = Field(default=0, ge=0, le=LONGEST_AHEAD)
    """How many tokens, the expert's first, the base has read when it looks back. So many are held back behind a
    deferral when the pair is served. 0: nothing is learned, and no token is taken back."""
    kind: Literal["linear", "mlp"] = "mlp"
    """As gate.kind, whatever train.mode is."""
    width: int = Field(default=32, ge=1)
    """Units of the hidden layer of an "mlp"."""
    features: Features = ()
    """What it reads of the base's own distribution where it looks back; names as in gate.features."""
    questions: int | None = Field(default=None, ge=1)
    """Only so many training questions, spread evenly."""
    positions: int = Field(default=8192, ge=2)
    """Most tokens of a split that are learned from. Of more, as many of both outcomes are taken as there are, and count
    for those that are left out."""
    steps: int = Field(default=1000, ge=1)
    """On all of them at once. The step with the least loss on the validation split is kept."""
    starts: int = Field(default=3, ge=1)
    """Of an "mlp", from other weights; the one with the least loss on the validation split is kept."""
    learning_rate: float = Field(default=1e-2, gt=0)
    weight_decay: float = Field(default=1e-2, ge=0)
    thresholds: tuple[float, ...] = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9)
    """An expert's token is taken back where it is regretted more. Those that are tried on validation questions, beside
    none: the one with the best score is taken, of equals the greatest."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.thresholds or any(not 0 <= threshold < 1 for threshold in self.thresholds):
            raise ValueError("thresholds: at least one, each from 0 to below 1")
        return self


class EvaluateSettings(Section):
    """The table and the plot."""

    rates: tuple[float, ...] = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
    """Nominal deferral rates of the plotted curves."""
    limit: int | None = Field(default=None, ge=1)
    """Only so many questions, spread evenly."""
    room: int = Field(default=16, ge=1)
    """An answer may have so many tokens more than the gold completion."""
    strategies: tuple[StrategyRow, ...] = ()
    """Rows beside deferral, for each gate of Co-LLM: a veto chosen on the validation questions, what members write
    together where the gate asks (a mixture by the gate's probabilities; a product or a union of all with equal
    weights), or character by character."""
    samples: int = Field(default=0, ge=0)
    """So many answers of the member that is best alone are sampled, of which the likeliest counts: what more steps of
    a single model buy. 0: no such row."""


class TrackSettings(Section):
    """Where losses, learning rates, gradient norms and the calibration's points are logged."""

    to: Literal["tensorboard", "wandb"] | None = None
    """Needs the package of that name. Files are below ``out/track``."""
    project: str = "collm"
    """Weights & Biases: the project's name."""
    offline: bool = True
    """Weights & Biases: write files that ``wandb sync`` uploads later."""


class LaneSettings(Section):
    """A lane of the serving engine. Names and meanings are those of engine.config's ``LaneConfig``."""

    executor: Literal["uni", "mp", "ray"] | None = None
    tensor_parallel_size: int | None = Field(default=None, ge=1)
    devices: tuple[int, ...] | None = None
    kv_cache_memory_bytes: int | None = Field(default=None, ge=1)
    vllm: dict[str, Any] = Field(default_factory=dict)
    """vLLM's options, under vLLM's own names."""


class EngineSettings(LaneSettings):
    """The serving engine that calibration and evaluation decode with. What stands here is for all lanes."""

    backend: str = "vllm"
    """What computes, as in the engine's configuration."""
    max_num_seqs: int = Field(default=64, ge=1)
    lanes: dict[str, LaneSettings] = Field(default_factory=dict)
    """What differs in one lane, by "base" or the expert's name; its table ``vllm`` is added to that of all lanes."""

    def lane(self, name: str) -> dict[str, Any]:
        """The fields of engine.config's ``LaneConfig`` for a lane, those that are set."""
        own = self.lanes.get(name, LaneSettings())
        found = {field: getattr(self, field) for field in LaneSettings.model_fields}
        found |= {field: value for field, value in own if value is not None}
        found["vllm"] = {**self.vllm, **own.vllm}
        return {field: value for field, value in found.items() if value not in (None, {})}


class Settings(Section):
    """A training project."""

    out: Path
    """Folder of everything that the stages write."""
    seeds: tuple[Seed, ...] = Field(default=(0,), min_length=1)
    """One training of each method a seed. The pair to be served is that of the first."""
    base: BaseSettings
    experts: tuple[ExpertSettings, ...] = Field(min_length=1)
    data: DataSettings
    compute: ComputeSettings = ComputeSettings()
    score: ScoreSettings = ScoreSettings()
    gate: GateSettings = GateSettings()
    init: InitSettings = InitSettings()
    train: TrainSettings = TrainSettings()
    rollouts: RolloutSettings = RolloutSettings()
    calibrate: CalibrateSettings = CalibrateSettings()
    regret: RegretSettings = RegretSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    engine: EngineSettings = EngineSettings()
    track: TrackSettings = TrackSettings()

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [expert.name for expert in self.experts]
        for name in names:
            if name == "base" or names.count(name) > 1:
                raise ValueError(f"experts.name: {name!r} is taken")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds: one is there twice")
        if self.train.mode == "joint" and (self.gate.kind != "linear" or self.gate.features):
            raise ValueError("gate: kinds other than 'linear', and features, need train.mode = 'gate'")
        if not self.gate.standardise and (self.gate.kind != "linear" or self.gate.features):
            raise ValueError("gate: kinds other than 'linear', and features, need gate.standardise = true")
        for name in self.engine.lanes:
            if name not in ("base", *names):
                raise ValueError(f"engine.lanes.{name}: is neither 'base' nor an expert")
        for name in ("base", *(expert.name for expert in self.experts if expert.adapter is None)):
            check_lane(name, self.engine.lane(name))
        for expert in self.experts:
            if expert.adapter is not None and expert.name in self.engine.lanes:
                raise ValueError(f"engine.lanes.{expert.name}: an adapter computes in the base's lane")
        for where, rates in (("calibrate", self.calibrate.rates), ("evaluate", self.evaluate.rates)):
            if not rates or any(not 0 <= rate <= 1 for rate in rates):
                raise ValueError(f"{where}.rates: rates are from 0 to 1")
        return self

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Names in the order of the gate's rows."""
        return tuple(expert.name for expert in self.experts)


def check_lane(name: str, lane: dict[str, Any]) -> None:
    """Find now what the engine would refuse when it starts, after hours of scoring and training.

    Raises:
        ValueError: naming the lane.
    """
    try:
        LaneConfig.model_validate({"model": name, **lane})
    except ValidationError as error:
        raise ValueError(f"engine, lane {name!r}: {_plain(error.errors()[0]['msg'])}") from error


def load_settings(file: Path, overrides: Sequence[str] = ()) -> Settings:
    """The settings of a training project; see :func:`read_settings`."""
    return read_settings(Settings, file, overrides)


def read_settings(kind: type[_S], file: Path, overrides: Sequence[str]) -> _S:
    """Read a TOML file. ``overrides`` are "section.key=value", values in TOML's notation (bare words are strings).

    Raises:
        SettingsError: naming the file and each wrong key.
    """
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise SettingsError(f"{file}: is not TOML: {error}") from error
    for override in overrides:
        _override(content, override)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        found = [f"{'.'.join(map(str, e['loc'])) or 'settings'}: {_plain(e['msg'])}" for e in error.errors()]
        raise SettingsError(f"{file}: " + "; ".join(found)) from error


def _plain(message: str) -> str:
    return message.removeprefix("Value error, ").replace("Extra inputs are not permitted", "no such setting")


def _override(content: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise SettingsError(f"--set {override}: is not KEY=VALUE")
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        value = text.strip()
    for key in keys[:-1]:
        content = content.setdefault(key, {})
        if not isinstance(content, dict):
            raise SettingsError(f"--set {override}: {key} is not a table")
    content[keys[-1]] = value
