"""From a configuration to lanes that fit each other. What does not fit is refused before any weight is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from engine.adapters import Adapter, is_adapter
from engine.checkpoints import TOKENIZER, Checkpoint, tokenizer_folder
from engine.compatibility import LaneVocabulary, compatibility
from engine.composed.artifact import Composition, is_composed
from engine.config import EngineConfig
from engine.errors import CheckpointError, CompositionError, ConfigError, GateError
from engine.gate import GateArtifact, gate_folder
from engine.hindsight import NEVER, Hindsight
from engine.lanes.shelf import Shelf
from engine.regret import RegretArtifact
from engine.spelling.speller import Speller
from engine.types import NEGATIVE, GateInfo, PolicyName, Relation
from engine.vllm_hooks.adapters import LaneAdapter, lora_arguments
from engine.vllm_hooks.memory import devices_of, memory_shares
from engine.vllm_hooks.runner import check_composed, check_config, check_triton
from engine.vocabulary import Member, SharedVocabulary, missing_rows


@dataclass(frozen=True)
class Plan:
    """How the lanes are to be started.

    Attributes:
        groups: numbers of lanes that write the same tokens, the base's first: one group where all do.
        written: by group, what its members may write.
        gate_in_head: the base is in the reference format: the last row of its LM head is theta.
        adapters: of the lanes that have one.
        spoken: by lane.
        differences: how the experts' vocabularies differ from the base's, one line each.
    """

    groups: tuple[tuple[int, ...], ...]
    written: tuple[SharedVocabulary, ...]
    gate: GateInfo | None
    gate_in_head: bool
    adapters: tuple[LaneAdapter, ...] = ()
    spoken: tuple[LaneVocabulary, ...] = ()
    differences: tuple[str, ...] = ()

    @property
    def shared(self) -> SharedVocabulary:
        """What the base may write, and all others unless they have vocabularies of their own."""
        return self.written[0]

    @property
    def vocabularies(self) -> Relation:
        """Whether all members write the same tokens."""
        return "spelled" if self.differences else "same"

    @property
    def vocab_size(self) -> int:
        """Ids of the base's prompts are in [0, vocab_size)."""
        return self.shared.size

    @property
    def eos_token_ids(self) -> list[int]:
        """Ids that end a text, whoever writes them, the base's first; where vocabularies differ the base's alone."""
        return list(self.shared.ends)

    def vocabulary(self, number: int, *guests: int) -> tuple[SharedVocabulary, list[int]]:
        """What a lane writes, and where among the members of that vocabulary it and its guests are."""
        group = next(index for index, lanes in enumerate(self.groups) if number in lanes)
        return self.written[group], [self.groups[group].index(lane) for lane in (number, *guests)]

    @property
    def blend_obstacle(self) -> str | None:
        """Why these members cannot be blended; None if nothing is in the way."""
        if self.differences:
            return "the members' vocabularies differ"
        apart = self.shared.private_ends
        if not apart:
            return None
        named = ", ".join(repr(self.shared.name(end)) for end in apart)
        return f"the members end their texts with different tokens ({named}), so that no combination of them ends"

    def notes(self, names: Sequence[str]) -> list[str]:
        """What who starts the pair should know, one line each.

        Args:
            names: of the lanes.
        """
        lines = list(self.differences)
        for group, shared in zip(self.groups, self.written, strict=True):
            whose = f"{' and '.join(names[lane] for lane in group)}: " if self.differences else ""
            ends = ", ".join(f"{end} {shared.name(end)!r}" for end in shared.ends)
            lines.append(f"{whose}ends of text: {ends or 'none'}")
            masked = shared.describe()
            if masked is not None:
                lines.append(f"{whose}vocabulary: {masked}")
        return lines


def make_plan(config: EngineConfig) -> Plan:
    """Read all checkpoints and the gate, and check that they fit.

    Raises:
        ConfigError: a checkpoint is missing or unreadable, or vocabularies differ and cannot be bridged; names the
            field and the entries.
        GateError: the gate does not fit, or is damaged.
    """
    check_config(config)
    labels = ["base", *(f"experts.{expert.name}" for expert in config.experts)]
    checkpoints = []
    members = []
    adapters: list[LaneAdapter] = []
    for number, (label, name, lane) in enumerate(zip(labels, config.lane_names, config.lanes, strict=True)):
        if is_adapter(Path(lane.model)):
            raise ConfigError(f"{label}.model: {lane.model} is a LoRA adapter: name it as {label}.adapter")
        try:
            checkpoint = Checkpoint.find(lane.model, lane.vllm, _read_with_vllm)
            if lane.adapter is not None:
                adapter = _read_adapter(label, lane.adapter, checkpoint)
                adapters.append(LaneAdapter(number, name, adapter))
                if (adapter.directory / TOKENIZER).is_file() and "tokenizer" not in lane.vllm:
                    checkpoint = checkpoint.with_tokenizer(adapter.directory)
            if is_composed(checkpoint.directory):
                if lane.adapter is not None:
                    raise ConfigError(f"{label}.adapter: {lane.model} is a composed model, which takes no adapters")
                check_composed(config, label)
                Composition.load(checkpoint.directory).check()
            members.append(Member(name, checkpoint.vocabulary, checkpoint.rows, checkpoint.ends))
        except (CheckpointError, CompositionError) as error:
            raise ConfigError(f"{label}.model: {error}") from error
        checkpoints.append(checkpoint)
    base, experts = checkpoints[0], checkpoints[1:]
    apart = _differences(config, labels, checkpoints)
    differences = tuple(apart.values())
    for number, (label, member) in enumerate(zip(labels, members, strict=True)):
        own = member if number in apart else members[0]
        if lacks := missing_rows(own.vocabulary, member.rows):
            raise ConfigError(f"{label}.model: has {lacks}")
    gate_in_head = config.gate.in_lm_head or (config.gate.path is None and base.gate_in_head)
    gate: GateInfo | None = None
    if config.gate.path is not None:
        folder = gate_folder(config.gate.path)
        artifact = GateArtifact.load(folder)
        names = [expert.name for expert in config.experts]
        if list(artifact.experts) != names:
            raise GateError(
                f"gate.path: the gate is for the experts {list(artifact.experts)}, the configuration has {names}"
            )
        if artifact.hidden_size != base.head_width:
            raise GateError(
                f"gate.path: the gate is for hidden size {artifact.hidden_size}, the base has {base.head_width}"
            )
        artifact.check_fits(base, experts)
        if artifact.default_policy not in get_args(PolicyName):
            raise GateError(f"gate.path: unknown default policy {artifact.default_policy!r}")
        gate = GateInfo(
            config.gate.path,
            config.gate.policy or cast("PolicyName", artifact.default_policy),
            artifact.default_threshold if config.gate.threshold is None else config.gate.threshold,
            artifact.measured("deferral_rate"),
            artifact.measured("expert_seconds_per_token"),
            _hindsight(folder, base),
        )
    elif gate_in_head and experts:
        if len(experts) != 1:
            raise GateError(f"gate.in_lm_head: the reference format is for one expert, not {len(experts)}")
        gate = GateInfo(
            "lm_head",
            config.gate.policy or "threshold",
            0.5 if config.gate.threshold is None else config.gate.threshold,
        )
    if config.gate.regret < NEVER and (gate is None or gate.hindsight is None):
        raise ConfigError(
            "gate.regret: nothing can be taken back without a regret artifact (regret.json in the folder of "
            "gate.path); leave it out, or train one"
        )
    numbers = range(len(members))
    groups = (tuple(number for number in numbers if number not in apart), *((number,) for number in apart))
    written = tuple(SharedVocabulary([members[number] for number in group]) for group in groups)
    spoken = {
        number: _spoken(checkpoint, one, place, speller)
        for group, one in zip(groups, written, strict=True)
        for speller in [_speller(checkpoints[group[0]], one)]
        for place, (number, checkpoint) in enumerate((number, checkpoints[number]) for number in group)
    }
    in_order = tuple(spoken[number] for number in numbers)
    return Plan(groups, written, gate, gate_in_head, tuple(adapters), in_order, differences)


def _differences(config: EngineConfig, labels: Sequence[str], checkpoints: Sequence[Checkpoint]) -> dict[int, str]:
    """By number of the expert how its vocabulary differs from the base's, one line each.

    Raises:
        ConfigError: they differ so that no text can be written together.
    """
    found = {}
    base = checkpoints[0]
    for number, (label, checkpoint) in enumerate(zip(labels, checkpoints, strict=True)):
        try:
            relation, reason = compatibility(base, checkpoint)
        except CheckpointError as error:
            raise ConfigError(f"{label}.model: {error}") from error
        if relation == "same":
            continue
        if relation is None:
            raise ConfigError(f"{label}.model: base and expert do not share a vocabulary; {reason}")
        if config.hosts[number] != number:
            raise ConfigError(f"{label}.adapter: an adapter of the base must have the base's vocabulary; {reason}")
        found[number] = f"{label} has a vocabulary of its own, in which it spells the common text; {reason}"
    return found


def _speller(checkpoint: Checkpoint, shared: SharedVocabulary) -> Speller | None:
    """Of a group of lanes, which spell alike; None if their vocabulary cannot spell every text."""
    try:
        if set(shared.ends) == set(checkpoint.ends):
            return (
                checkpoint.speller
            )  # which has been made where vocabularies differ: sorting a large one takes seconds
        return checkpoint.speller_ending_with(shared.ends)
    except CheckpointError:
        return None


def _hindsight(folder: Path, base: Checkpoint) -> Hindsight | None:
    """Of the regret artifact beside the gate's, if there is one."""
    artifact = RegretArtifact.beside(folder)
    if artifact is None:
        return None
    if artifact.hidden_size != base.head_width:
        raise GateError(
            f"gate.path: the regret is for hidden size {artifact.hidden_size}, the base has {base.head_width}"
        )
    if differences := artifact.base.differences(base.identity):
        raise GateError(f"gate.path: the regret was made for another base: {'; '.join(differences)}")
    return artifact.hindsight


def _spoken(checkpoint: Checkpoint, shared: SharedVocabulary, place: int, speller: Speller | None) -> LaneVocabulary:
    folder = str(tokenizer_folder(checkpoint.tokenizer_directory))
    return LaneVocabulary(shared.size, tuple(shared.ends_of(place)), folder, speller)


def _read_adapter(label: str, name: str, model: Checkpoint) -> Adapter:
    try:
        adapter = Adapter.read(name)
        problem = adapter.misfit(model)
    except CheckpointError as error:
        raise ConfigError(f"{label}.adapter: {error}") from error
    if problem is not None:
        raise ConfigError(f"{label}.adapter: {adapter.directory} {problem}")
    return adapter


def _read_with_vllm(directory: Path, overrides: Mapping[str, Any]) -> Any:
    """A configuration as vLLM reads it, which knows families that transformers does not."""
    from vllm.transformers_utils.config import get_config

    return get_config(str(directory), trust_remote_code=False, hf_overrides_kw=dict(overrides))


def load_lanes(
    config: EngineConfig,
    plan: Plan,
    *,
    on_progress: Callable[[str], None],
    on_ready: Callable[[], None],
    on_failure: Callable[[str], None],
    templates: Any = None,
    shelf: Shelf | None = None,
) -> list[Any]:
    """Start one :class:`~engine.vllm_hooks.lane.VllmLane` a model, in lane order.

    Args:
        on_progress: one line at a time.
        on_ready: called from another thread when a lane has work that it had not before.
        templates: compiled forms, which the lanes share; see :class:`engine.vllm_hooks.grammars.Templates`.
        shelf: where the lanes lay down what others blend.
        on_failure: called from another thread with the lane's name when a worker process of it dies.

    Raises:
        ConfigError: vLLM refuses a lane's options; names the lane.
    """
    from engine.vllm_hooks.guest import GuestLane
    from engine.vllm_hooks.hashes import PromptHashes
    from engine.vllm_hooks.lane import VllmLane
    from engine.vllm_hooks.options import engine_arguments
    from engine.vllm_hooks.processor import vector_units
    from engine.vllm_hooks.shared_shelf import SharedShelf

    check_triton(config)
    lanes: list[VllmLane | GuestLane] = []
    hashes = PromptHashes()
    shares = _memory_shares(config)
    for number, (name, lane) in enumerate(zip(config.lane_names, config.lanes, strict=True)):
        is_base = not lanes
        if config.hosts[number] != number:
            host = lanes[config.hosts[number]]
            assert isinstance(host, VllmLane)
            lanes.append(host.guest_lanes()[number])
            continue
        adapter = next((each for each in plan.adapters if each.number == number), None)
        guests = [each for each in plan.adapters if config.hosts[each.number] == number != each.number]
        label = "base" if is_base else f"experts.{name}"
        on_progress(f"loading {name}: {lane.model}")
        shared, places = plan.vocabulary(number, *(guest.number for guest in guests))
        arguments = engine_arguments(
            lane,
            label=label,
            max_num_seqs=config.scheduler.max_num_seqs,
            vocab_size=shared.size,
            masked=shared.masked(*places),
            gate_path=str(gate_folder(config.gate.path)) if is_base and config.gate.path is not None else None,
            gate_in_head=plan.gate_in_head and is_base,
            memory_share=shares[number],
            lora=lora_arguments([*([] if adapter is None else [adapter]), *guests]),
            guests=len(guests) + (is_base and config.scheduler.guidance),
            record=config.record if is_base else None,
            shelf=shelf.layout if isinstance(shelf, SharedShelf) else None,
            model_runner=config.scheduler.model_runner,
        )
        speller = plan.spoken[number].speller
        try:
            with _visible_devices(lane.devices):
                started_lane = VllmLane(
                    name,
                    arguments,
                    eos_token_ids=shared.ends_of(places[0]),
                    private_ends=shared.private_ends,
                    hashes=hashes,
                    templates=templates,
                    on_ready=on_ready,
                    on_failure=lambda name=name: on_failure(name),  # type: ignore[misc]
                    adapter=adapter,
                    guests=guests,
                    number=number,
                    shelf=shelf,
                    vocabulary=None if speller is None else speller.vocabulary,
                    # Where vocabularies differ, a lane is told anew only when it has said what it was asked.
                    depth=0 if plan.differences else _depth(config.scheduler.steps_in_flight, is_base=is_base),
                )
            lanes.append(started_lane)
            for note in started_lane.notes:
                on_progress(note)
        except Exception as error:  # of vLLM, torch, safetensors, the platform: all mean the same here
            for started in lanes:
                started.shutdown()
            raise ConfigError(f"{label}: vLLM cannot start {lane.model}: {_one_line(error)}") from error
        if (dtype := started_lane.slow_dtype) is not None:
            on_progress(
                f"{name} computes in {dtype}, which this processor ({vector_units()}) does many times slower than"
                f' float32: set {label}.vllm.dtype to "float32" unless memory is short'
            )
    if config.scheduler.guidance:
        assert isinstance(lanes[0], VllmLane)
        lanes.append(lanes[0].add_voice(len(lanes), NEGATIVE))
    return lanes


def _depth(steps_in_flight: Literal["auto"] | int, *, is_base: bool) -> int:
    """How many steps of a lane may be launched at once; a second one looks ahead, which experts would do in vain."""
    from vllm.platforms import current_platform

    if steps_in_flight == "auto":
        # With 2 the rows of a pair that defers fall apart into smaller steps; on an H200 that cost more than it hid.
        steps_in_flight = 0 if current_platform.is_cpu() else 1
    return steps_in_flight if is_base else min(steps_in_flight, 1)


def _memory_shares(config: EngineConfig) -> list[float | None]:
    """See :func:`engine.vllm_hooks.memory.memory_shares`. Of models on a hub nothing is known yet."""
    from vllm.platforms import current_platform

    steps = [number for number, host in enumerate(config.hosts) if number == host]
    lanes = [config.lanes[number] for number in steps]
    sizes = [sum(file.stat().st_size for file in Path(lane.model).glob("*.safetensors")) for lane in lanes]
    if current_platform.is_cpu() or not all(sizes):
        return [None] * len(config.lanes)
    devices = {number for lane in lanes for number in devices_of(lane)}
    totals = {number: int(current_platform.get_device_total_memory(number)) for number in devices}
    labels = ["base", *(f"experts.{expert.name}" for expert in config.experts if not expert.is_guest)]
    found = dict(zip(steps, memory_shares(labels, lanes, sizes, totals), strict=True))
    return [found.get(number) for number in range(len(config.lanes))]


@contextmanager
def _visible_devices(devices: tuple[int, ...] | None) -> Iterator[None]:
    """Worker processes inherit the environment: show them only their lane's devices."""
    if devices is None:
        yield
        return
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(_among_visible(devices, before))
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _among_visible(devices: tuple[int, ...], visible: str | None) -> list[str]:
    """Devices by their place in CUDA_VISIBLE_DEVICES, as everything that runs under it counts them.

    Raises:
        ConfigError: there are not so many.
    """
    if visible is None:
        return [str(device) for device in devices]
    given = [name.strip() for name in visible.split(",") if name.strip()]
    beyond = [device for device in devices if device >= len(given)]
    if beyond:
        raise ConfigError(f"devices: {beyond[0]} is not among the {len(given)} of CUDA_VISIBLE_DEVICES={visible}")
    return [given[device] for device in devices]


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 600 else text[:600] + "..."


def versions_in_use() -> dict[str, str]:
    """Versions of what computes, for /version and for reports."""
    import torch
    import vllm

    return {"vllm": vllm.__version__, "torch": str(torch.__version__)}
