"""vLLM finds composed checkpoints by the installed package alone."""

from __future__ import annotations

from importlib.metadata import entry_points


def test_the_entry_point_is_installed() -> None:
    names = [point.value for point in entry_points(group="vllm.general_plugins")]
    assert "engine.composed.register:register" in names
