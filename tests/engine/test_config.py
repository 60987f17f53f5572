"""The configuration refuses what cannot be served, and says which field it is."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from engine.config import EngineConfig


def fields(**changes: Any) -> dict[str, Any]:
    """A pair; ``changes`` are dotted names with underscores doubled, e.g. ``base__model``."""
    config: dict[str, Any] = {
        "base": {"model": "base"},
        "experts": [{"name": "math", "model": "expert"}],
        "gate": {},
        "scheduler": {},
    }
    for path, value in changes.items():
        *rooms, name = path.split("__")
        place = config
        for room in rooms:
            place = place[room][0] if room == "experts" else place[room]
        place[name] = value
    return config


def problem(**changes: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        EngineConfig.model_validate(fields(**changes))
    return str(caught.value)


def make(**changes: Any) -> EngineConfig:
    return EngineConfig.model_validate(fields(**changes))


def expert(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "model": "expert", **more}


def test_defaults() -> None:
    config = make()
    assert config.lane_names == ("base", "math")
    assert [lane.model for lane in config.lanes] == ["base", "expert"]
    assert (config.scheduler.coordination, config.scheduler.max_num_seqs) == ("auto", 64)
    assert (config.base.backend, config.base.executor, config.base.tensor_parallel_size) == ("vllm", "uni", 1)


def test_base_alone() -> None:
    config = EngineConfig.model_validate({"base": {"model": "base"}})
    assert config.lane_names == ("base",)
    assert not config.on_separate_devices


@pytest.mark.parametrize(
    ("names", "changes"),
    [
        ("base.model", {"base__model": ""}),
        ("base.backend", {"base__backend": "bench/standin.py"}),
        ("base.executor", {"base__executor": "threads"}),
        ("base.tensor_parallel_size", {"base__tensor_parallel_size": 0}),
        ("base.kv_cache_memory_bytes", {"base__kv_cache_memory_bytes": 0}),
        ("base.devices.0", {"base__devices": ["zero"]}),
        ("base.vllm", {"base__vllm": "max_model_len=4"}),
        ("experts.0.name", {"experts__name": "no spaces"}),
        ("experts.0.name", {"experts__name": ""}),
        ("experts.0.name", {"experts__name": "x" * 65}),
        ("experts.0.model", {"experts__model": ""}),
        ("gate.policy", {"gate__policy": "sometimes"}),
        ("gate.threshold", {"gate__threshold": 1.5}),
        ("gate.threshold", {"gate__threshold": -0.1}),
        ("gate.threshold", {"gate__threshold": float("nan")}),
        ("scheduler.coordination", {"scheduler__coordination": "chaos"}),
        ("scheduler.max_num_seqs", {"scheduler__max_num_seqs": 0}),
    ],
)
def test_a_bad_value_is_refused_by_field(names: str, changes: dict[str, Any]) -> None:
    assert f"\n{names}\n" in problem(**changes)


@pytest.mark.parametrize("room", ["", "base__", "experts__", "gate__", "scheduler__"])
def test_unknown_keys_are_refused_by_name(room: str) -> None:
    message = problem(**{f"{room}tresholds": 1})
    assert "tresholds\n  Extra inputs are not permitted" in message


@pytest.mark.parametrize("missing", ["base", "base__model", "experts__name", "experts__model"])
def test_missing_keys_are_refused_by_name(missing: str) -> None:
    config = fields()
    *rooms, name = missing.split("__")
    place: Any = config
    for room in rooms:
        place = place[room][0] if room == "experts" else place[room]
    del place[name]
    with pytest.raises(ValidationError, match=rf"{name}\n  Field required"):
        EngineConfig.model_validate(config)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("tensor_parallel_size greater than 1 needs executor", {"base__tensor_parallel_size": 2}),
        ("devices needs executor 'mp'", {"base__devices": [0]}),
        ("devices needs executor 'mp'", {"base__devices": [0, 1], "base__executor": "mp"}),
        ("devices needs executor 'mp'", {"experts__devices": [0], "experts__executor": "ray"}),
        ("vllm.model", {"base__vllm": {"model": "other"}}),
        ("vllm.tensor_parallel_size", {"base__vllm": {"tensor_parallel_size": 2}}),
        ("vllm.kv_cache_memory_bytes", {"experts__vllm": {"kv_cache_memory_bytes": 1}}),
        ("experts.name: 'base' is taken", {"experts": [expert("base")]}),
        ("experts.name: 'a' is taken", {"experts": [expert("a"), expert("b"), expert("a")]}),
        ("gate.path: a gate needs at least one expert", {"experts": [], "gate__path": "gate"}),
        ("scheduler.coordination: 'overlapped' needs", {"scheduler__coordination": "overlapped"}),
        (
            "a.vllm.structured_outputs_config: must be the same in all lanes; it is {'backend': 'xgrammar'}",
            {"experts": [{**expert("a"), "vllm": {"structured_outputs_config": {"backend": "xgrammar"}}}]},
        ),
        (
            "experts.a.vllm.structured_outputs_config: must be the same",
            {
                "base__vllm": {"structured_outputs_config": {"disable_any_whitespace": True}},
                "experts": [expert("a")],
            },
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(message: str, changes: dict[str, Any]) -> None:
    assert message in problem(**changes)


def test_the_default_back_end_is_the_same_as_its_name() -> None:
    named = {"structured_outputs_config": {"backend": "guidance"}}
    EngineConfig.model_validate({"base": {"model": "b", "vllm": named}, "experts": [expert("a")]})


def test_what_a_lane_refuses_names_the_lane() -> None:
    assert "\nexperts.0\n" in problem(experts__tensor_parallel_size=2)


def test_nothing_can_be_changed_afterwards() -> None:
    config = make()
    for part, name in ((config, "base"), (config.base, "model"), (config.gate, "policy"), (config.experts[0], "name")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, name, "other")


def test_survives_the_way_to_the_engine_process() -> None:
    config = make(base__vllm={"dtype": "float32", "max_model_len": 64}, base__executor="mp", base__devices=[1])
    assert EngineConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("base", "experts", "separate"),
    [
        (None, [(0,)], False),
        (None, [(1,)], True),
        (None, [None], False),
        ((2,), [(0,), (1,)], True),
        ((2,), [(0,), (2,)], False),
        ((0, 1), [(2, 3)], True),
        ((0, 1), [(1, 2)], False),
        ((0,), [(1,), None], False),
    ],
)
def test_separate_devices(base: tuple[int, ...] | None, experts: list[tuple[int, ...] | None], separate: bool) -> None:
    def placed(devices: tuple[int, ...] | None) -> dict[str, Any]:
        if devices is None:
            return {}
        return {"devices": devices, "executor": "mp", "tensor_parallel_size": len(devices)}

    config = EngineConfig.model_validate(
        {
            "base": {"model": "base", **placed(base)},
            "experts": [expert(f"e{number}", **placed(devices)) for number, devices in enumerate(experts)],
        }
    )
    assert config.on_separate_devices == separate


def test_ray_gives_each_lane_a_device() -> None:
    assert make(base__executor="ray", experts__executor="ray").on_separate_devices
    assert not make(experts__executor="ray").on_separate_devices
    assert "record" in problem(base__executor="ray", record={"folder": "tables", "rows": 1})


def test_overlapped_with_one_lane_in_process() -> None:
    config = make(scheduler__coordination="overlapped", experts__executor="mp")
    assert config.scheduler.coordination == "overlapped"


def test_standins_may_overlap() -> None:
    make(scheduler__coordination="overlapped", base__backend="bench.standin", experts__backend="bench.standin")


@pytest.mark.parametrize("name", ["", "bench/standin.py", "bench.standin:load", "..standin"])
def test_a_backend_is_a_module_s_name(name: str) -> None:
    assert "backend" in problem(base__backend=name)


def test_an_adapter_of_the_base_is_a_guest_of_its_lane() -> None:
    """Beside a whole model, and an adapter of another model, which has a lane of its own."""
    guest = {"name": "guest", "adapter": "lora"}
    config = make(experts=[expert("whole"), guest, expert("own", adapter="other")], base__vllm={"max_model_len": 64})
    assert config.hosts == (0, 1, 0, 3)
    assert [lane.model for lane in config.lanes] == ["base", "expert", "base", "expert"]
    assert [lane.adapter for lane in config.lanes] == [None, None, "lora", "other"]
    assert config.lanes[2].vllm == {"max_model_len": 64}
    assert EngineConfig.model_validate_json(config.model_dump_json()) == config
    make(scheduler__coordination="overlapped", experts=[guest, expert("whole", executor="mp")])


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("vllm: an adapter of the base computes in the base's steps: set base.vllm", {"vllm": {"max_model_len": 4}}),
        ("executor: an adapter of the base", {"executor": "mp"}),
        ("adapter: only lanes of vLLM have one", {"backend": "bench.standin"}),
    ],
)
def test_a_guest_has_no_options_of_its_own(message: str, options: dict[str, Any]) -> None:
    assert message in problem(experts=[{"name": "guest", "adapter": "lora", **options}])


def test_mixed_backends_are_refused() -> None:
    """A lane must not silently become a stand-in because another one is."""
    assert "backend" in problem(base__backend="bench.standin")
    assert "backend" in problem(experts__backend="bench.standin")
