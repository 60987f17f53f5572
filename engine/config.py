"""The engine's configuration, as one typed, frozen model. Unknown keys are errors.

vLLM's own options pass through under vLLM's own names in ``LaneConfig.vllm``; they are checked against vLLM's
``EngineArgs`` when the lane starts, since this module must not import vLLM.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engine.types import BASE, MOST_DRAFTS, NEGATIVE, PolicyName

OF_BASE = "(base)"
"""Stands for the model of an expert that is an adapter of the base's weights."""


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class LaneConfig(_Config):
    """One model and the vLLM engine that runs it."""

    model: str = Field(min_length=1)
    """Path of the checkpoint (or its name on a hub, where one can be reached)."""

    adapter: str | None = Field(default=None, min_length=1)
    """Folder of a LoRA adapter of the model (or its name on a hub). An expert that has an adapter and no ``model``
    adapts the base's own weights and computes in the base's steps, so it has none of the options below."""

    backend: str = Field(default="vllm", pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")
    """What computes: "vllm", or the name of a Python module that makes lanes of its own (``engine/lanes/backend.py``
    says how). One for all lanes."""

    executor: Literal["uni", "mp", "ray"] = "uni"
    """vLLM executor: "uni" in the engine's process, "mp" in worker processes, "ray" on a Ray cluster."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """Shards of the model. More than 1 needs executor mp or ray."""

    devices: tuple[int, ...] | None = None
    """CUDA devices of the lane's worker processes (executor mp). None: the first ones that the engine sees."""

    kv_cache_memory_bytes: int | None = Field(default=None, ge=1)
    """Memory for the KV cache. None: 1 GiB on CPU; on a GPU what the lane's share of the device leaves; lanes on one
    device share it by their weights."""

    vllm: dict[str, Any] = Field(default_factory=dict)
    """Any other vLLM engine option under vLLM's own name, e.g. {dtype = "bfloat16", max_model_len = 4096}."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tensor_parallel_size > 1 and self.executor == "uni":
            raise ValueError("tensor_parallel_size greater than 1 needs executor 'mp' or 'ray'")
        if self.devices is not None and (len(set(self.devices)) < len(self.devices) or min(self.devices) < 0):
            raise ValueError("devices must be different and not negative")
        if self.devices is not None and (self.executor != "mp" or len(self.devices) != self.tensor_parallel_size):
            raise ValueError("devices needs executor 'mp' and one device for each shard")
        if self.adapter is not None and self.backend != "vllm":
            raise ValueError("adapter: only lanes of vLLM have one")
        for ours in ("model", "tensor_parallel_size", "kv_cache_memory_bytes"):
            if ours in self.vllm:
                raise ValueError(f"vllm.{ours} is set beside the table 'vllm', as '{ours}'")
        return self

    @property
    def structured_output(self) -> Any:
        """vLLM's ``structured_outputs_config``, with the back end that is the default here."""
        given = self.vllm.get("structured_outputs_config", {})
        return {"backend": "guidance", **given} if isinstance(given, dict) else given


class ExpertConfig(LaneConfig):
    """A domain expert. Its name is the source of the tokens that it writes."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name, unique among the experts; "base", "blend" and "negative" are taken."""

    @model_validator(mode="before")
    @classmethod
    def _take_weights_of_base(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("adapter") is not None and "model" not in fields:
            return {**fields, "model": OF_BASE}
        return fields

    @model_validator(mode="after")
    def _check_guest(self) -> Self:
        if self.is_guest:
            for name, field in LaneConfig.model_fields.items():
                if name not in ("model", "adapter") and getattr(self, name) != field.get_default(
                    call_default_factory=True
                ):
                    raise ValueError(
                        f"{name}: an adapter of the base computes in the base's steps: set base.{name}, or give the"
                        " expert a model of its own"
                    )
        return self

    @property
    def is_guest(self) -> bool:
        """Whether it is an adapter of the base's weights, whose rows are computed in the base's steps."""
        return self.model == OF_BASE


class GateConfig(_Config):
    """The deferral gate, and what a request gets that does not say otherwise."""

    path: str | None = None
    """Folder of the gate artifact, or its name on a hub: "OWNER/NAME" or "OWNER/NAME@REVISION". None: the pair has no
    gate, unless its base is in the reference format, and serves the policies that need none."""

    in_lm_head: bool = False
    """The base is in the reference format (V+1 outputs): the last row of its LM head is the gate. Not needed where the
    checkpoint says so itself, as one written by ``training.convert`` does."""

    policy: PolicyName | None = None
    """Default policy. None: the artifact's."""

    threshold: float | None = Field(default=None, ge=0, le=1)
    """Default threshold. None: the artifact's."""

    veto: float = Field(default=0.0, ge=0, le=1)
    """Default of ``collaboration.veto``: an expert whose top probability is below this stands back for the base's own
    token. 0: none does."""

    regret: float = Field(default=1.0, ge=0, le=1)
    """Default of ``collaboration.regret``: an expert's token is taken back where the base, having read on, regrets it
    more than this. Needs a regret artifact beside the gate's. 1: none is."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.path is not None and self.in_lm_head:
            raise ValueError("path and in_lm_head exclude each other")
        return self


class RecordConfig(_Config):
    """Where the base's worker writes what the LM head reads at scored positions; see ``engine/vllm_hooks/record.py``.
    For training: not part of a server's configuration.
    """

    folder: str
    """Of the tables."""

    rows: int = Field(ge=1)
    """How many the tables have."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of hidden states."""


class SchedulerConfig(_Config):
    """How the lanes are driven."""

    coordination: Literal["auto", "lockstep", "overlapped"] = "auto"
    """"lockstep": base step, expert step, repeat; best when lanes share a device. "overlapped": every lane steps as
    soon as it has work; best on separate devices, and all lanes but one must have executor mp or ray. "auto":
    overlapped where every expert has ``devices`` of its own or all lanes are Ray's, else lockstep."""

    max_num_seqs: int = Field(default=64, ge=1)
    """Most requests in the lanes at once. The rest wait: in order of arrival within a client (an API key, else an
    address), and between clients so that whoever got the fewest tokens is next."""

    gather: Literal["auto", "off"] | Annotated[int, Field(ge=1)] = "auto"
    """Lockstep only: how many deferred requests an expert's step waits for, while the base goes on with the others.
    "auto" weighs the measured costs of steps, "off" never waits."""

    gather_max_wait_seconds: float = Field(default=0.2, ge=0)
    """Longest that a deferred request is held back so that others can join it."""

    run_ahead: Literal["auto", "off"] | Annotated[int, Field(ge=1, le=MOST_DRAFTS)] = "auto"
    """How many tokens the base drafts past a deferral before the expert has written, for requests that do not say.
    The expert decides all of a window's deferred positions in one visit. "auto" adapts to how often the expert
    agrees with the drafts. What is written does not depend on it."""

    steps_in_flight: Literal["auto"] | Annotated[int, Field(ge=0, le=2)] = "auto"
    """How many steps of a lane that computes in the engine's own process may wait for its device. 0: each step is
    waited for. 1: a lane's step is prepared while the device computes another lane's. 2: the base's next step, too, is
    launched before the samples of the last one are read; a row that was deferred has drafted one token by then. "auto":
    1 on a GPU, 0 on a CPU; 2 is worth trying where little is deferred. What is written does not depend on it."""

    model_runner: Literal["v1", "v2"] = "v1"
    """Which of vLLM's two model runners lanes have. vLLM calls "v1" deprecated, and "v2" is its own default on GPUs.
    Here "v2" is experimental, and was slower on the one GPU that ran both wherever tokens were deferred. It needs
    Triton. What is written does not depend on it."""

    guidance: bool = False
    """Serve the blend "cfg": a request has a second row in the base, with its negative prompt. The base keeps places
    for twice as many rows, which on a GPU takes memory. Needs executor "uni"."""

    step_timeout_seconds: float = Field(default=60.0, gt=0)
    """A lane whose step takes longer counts as lost until the step ends. Requests that wait for it end with an error,
    or go on as ``expert_failure`` says. A lost base, or a lane that computes in the engine's own process, ends the
    engine."""

    expert_failure: Literal["error", "base"] = "error"
    """What becomes of a request whose expert is lost: "error" ends it, "base" lets the base write instead."""


class EngineConfig(_Config):
    """A pair (or a base with several experts) to be served."""

    base: LaneConfig
    """The general model, which every joint request starts with."""

    experts: tuple[ExpertConfig, ...] = ()
    """The domain experts. None: the base is served alone."""

    gate: GateConfig = GateConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    record: RecordConfig | None = None
    """For training."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [expert.name for expert in self.experts]
        for name in names:
            if name in ("base", "blend", NEGATIVE) or names.count(name) > 1:
                raise ValueError(f"experts.name: {name!r} is taken")
        if len({lane.backend for lane in self.lanes}) > 1:
            raise ValueError("backend: all lanes must have the same one")
        forms = {name: lane.structured_output for name, lane in zip(self.lane_names, self.lanes, strict=True)}
        for name, options in forms.items():
            if options != forms["base"]:
                # What one lane forbids and another one allows ends requests in the middle of their answers.
                raise ValueError(
                    f"experts.{name}.vllm.structured_outputs_config: must be the same in all lanes; it is {options} "
                    f"here and {forms['base']} in base"
                )
        if self.scheduler.guidance and self.base.executor != "uni":
            raise ValueError("scheduler.guidance needs executor 'uni' for the base")
        if self.record is not None and self.base.executor == "ray":
            raise ValueError("record: needs the base on this machine (executor 'uni' or 'mp'), where its tables are")
        if self.gate.path is not None and not self.experts:
            raise ValueError("gate.path: a gate needs at least one expert")
        if self.scheduler.coordination == "overlapped":
            in_process = [
                lane
                for number, lane in enumerate(self.lanes)
                if self.hosts[number] == number and lane.backend == "vllm" and lane.executor == "uni"
            ]
            if len(in_process) > 1:
                raise ValueError(
                    "scheduler.coordination: 'overlapped' needs executor 'mp' or 'ray' for all lanes but one"
                )
        return self

    @property
    def on_separate_devices(self) -> bool:
        """Whether every expert has CUDA devices of its own, so that the lanes can step at the same time.

        Ray gives each worker a whole device that no other worker has, but knows nothing of lanes outside it.
        """
        if self.experts and all(lane.executor == "ray" for lane in self.lanes):
            return True
        taken = list(self.base.devices or range(self.base.tensor_parallel_size))
        own = [expert for expert in self.experts if not expert.is_guest]
        for expert in own:
            taken += expert.devices or taken[:1]
        return bool(own) and len(taken) == len(set(taken))

    @property
    def all_hosts(self) -> tuple[int, ...]:
        """``hosts``, with that of the base's negative prompts: the base, or itself where lanes are not vLLM's."""
        if not self.scheduler.guidance:
            return self.hosts
        return (*self.hosts, BASE if self.base.backend == "vllm" else len(self.hosts))

    @property
    def blend_obstacle(self) -> str | None:
        """Why no blend can be served; None if nothing is in the way."""
        for name, lane in zip(self.lane_names, self.lanes, strict=True):
            if lane.executor == "ray":
                return f"{name} may compute on another machine (executor 'ray'), where blends cannot reach it"
        return None

    @property
    def characters_obstacle(self) -> str | None:
        """Why members cannot write by characters; None if nothing is in the way."""
        for name, lane in zip(self.lane_names, self.lanes, strict=True):
            if lane.executor != "uni":
                return (
                    f"{name} computes in worker processes (executor {lane.executor!r}), where its distributions cannot "
                    "be reached"
                )
        return None

    @property
    def has_workers(self) -> bool:
        """Whether some lane computes in worker processes."""
        return any(lane.executor != "uni" for lane in self.lanes)

    @property
    def lanes(self) -> tuple[LaneConfig, ...]:
        """Base first, then the experts: the order of lane numbers. Adapters of the base have the base's options."""
        return (
            self.base,
            *(
                self.base.model_copy(update={"adapter": expert.adapter}) if expert.is_guest else expert
                for expert in self.experts
            ),
        )

    @property
    def hosts(self) -> tuple[int, ...]:
        """For each lane the one in whose steps it computes: the base's for adapters of the base, else its own."""
        own = enumerate(self.experts, start=1)
        return (BASE, *(BASE if expert.is_guest else number for number, expert in own))

    @property
    def lane_names(self) -> tuple[str, ...]:
        """Names in the order of lane numbers."""
        return ("base", *(expert.name for expert in self.experts))
