"""The Dockerfile and the compose files: linted, valid by schema, and in line with each other and with the project.

No engine is needed; an image is not built here.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

from server import healthcheck
from tests.packaging.sources import ROOT

BIN = Path(sys.executable).parent
COMPOSE_FILES = ["docker-compose.yml", "docker-compose.gpu.yml"]


def hadolint(dockerfile: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BIN / "hadolint", "--no-color", dockerfile], capture_output=True, text=True, timeout=60)


def check_schema(schema: str, *files: Path) -> subprocess.CompletedProcess[str]:
    command = [BIN / "check-jsonschema", "--builtin-schema", f"vendor.{schema}", *files]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text()


def test_dockerfile_is_clean() -> None:
    result = hadolint(ROOT / "Dockerfile")
    assert result.returncode == 0, result.stdout


def test_hadolint_can_fail(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM debian:latest\nRUN cd /tmp && pip install six\n")
    result = hadolint(bad)
    assert result.returncode != 0
    assert "DL3007" in result.stdout


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_compose_files_are_valid(name: str) -> None:
    result = check_schema("compose-spec", ROOT / name)
    assert result.returncode == 0, result.stdout


def test_compose_check_can_fail(tmp_path: Path) -> None:
    bad = tmp_path / "docker-compose.yml"
    bad.write_text("services:\n  server:\n    image: collm\n    restrat: always\n")
    assert check_schema("compose-spec", bad).returncode != 0


def test_workflows_are_valid() -> None:
    result = check_schema("github-workflows", *sorted((ROOT / ".github/workflows").glob("*.yml")))
    assert result.returncode == 0, result.stdout


def test_image_runs_without_rights_and_is_checked(dockerfile: str) -> None:
    final = dockerfile.rpartition("\nFROM ")[2]
    assert re.search(r"^USER [1-9][0-9]*:[1-9][0-9]*$", final, re.M)
    assert re.search(r"^HEALTHCHECK ", final, re.M)
    [check] = re.findall(r'^    CMD \["python", "-m", "(.+)"\]$', final, re.M)
    assert callable(importlib.import_module(check).main)
    assert f"EXPOSE {healthcheck.DEFAULT_PORT}\n" in final


def environment(dockerfile: str) -> dict[str, str]:
    """What the image sets."""
    [block] = re.findall(r"^ENV ((?:.+\\\n)*.+)$", dockerfile.rpartition("\nFROM ")[2], re.M)
    return dict(pair.split("=", 1) for pair in block.replace("\\\n", " ").split())


CACHES = ("HOME", "XDG_CACHE_HOME", "HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
"""Variables that name folders to which the image writes; torch loads libraries from the last two."""


@pytest.mark.parametrize("name", CACHES)
def test_what_is_compiled_goes_where_it_may_be_loaded_from(dockerfile: str, name: str) -> None:
    """Below a volume, and below no tmpfs: Docker mounts those noexec."""
    folder = PurePosixPath(environment(dockerfile)[name])
    server = load("docker-compose.yml")["services"]["server"]
    scratch = [mount.split(":")[0] for mount in server["tmpfs"]]
    assert scratch == ["/tmp"]
    assert not any(folder.is_relative_to(mount) for mount in scratch)
    volumes = load("docker-compose.yml")["volumes"]
    targets = [mount.split(":")[1] for mount in server["volumes"] if mount.split(":")[0] in volumes]
    assert any(folder.is_relative_to(target) for target in targets)
    # In Kubernetes a folder of the machine's disk.
    pod = load("deploy/kubernetes/base/deployment.yaml")["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert name not in [variable["name"] for variable in container["env"]]
    mounts = [mount for mount in container["volumeMounts"] if folder.is_relative_to(mount["mountPath"])]
    [volume] = [volume for volume in pod["volumes"] if volume["name"] in [mount["name"] for mount in mounts]]
    assert "medium" not in volume["emptyDir"]


def test_image_copies_what_exists_and_is_let_through(dockerfile: str) -> None:
    """Every source of a COPY is in the project and in .dockerignore's list of what goes to the builder."""
    let_through = {
        line[1:].rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    copied = set()
    for line in re.findall(r"^COPY (?!--from)(.+)$", dockerfile, re.M):
        copied |= set(line.replace("${DEVICE}", "*").split()[:-1])
    assert copied == let_through
    assert [path for path in copied if not list(ROOT.glob(path))] == []


def test_image_holds_every_package(dockerfile: str) -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["packages"]
    assert [package for package in packages if f"COPY {package} {package}\n" not in dockerfile] == []


def test_no_secret_in_image_or_compose(dockerfile: str) -> None:
    secret = re.compile(r"(password|passwd|secret|token|api_?key)\s*[:=]\s*\S", re.I)
    for text in [dockerfile, *((ROOT / name).read_text() for name in COMPOSE_FILES)]:
        assert secret.search(text) is None


def test_compose_publishes_on_loopback_only() -> None:
    services = load("docker-compose.yml")["services"]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_compose_mounts_what_exists() -> None:
    services = load("docker-compose.yml")["services"]
    mounts = [
        # A variable stands for its default.
        re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", mount).split(":")[0]
        for service in services.values()
        for mount in service.get("volumes", [])
    ]
    assert "./models" in mounts
    assert [mount for mount in mounts if mount.startswith("./") and not (ROOT / mount).is_dir()] == []


def test_gpu_override_changes_only_the_server() -> None:
    override = load("docker-compose.gpu.yml")["services"]
    assert list(override) == ["server"]
    assert override["server"]["build"]["args"]["DEVICE"] == "gpu"
    [device] = override["server"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"


def test_default_config_is_in_the_image(dockerfile: str) -> None:
    [config] = re.findall(r'^CMD \["--config", "(.+)"\]$', dockerfile, re.M)
    assert (ROOT / config).is_file()
    assert config in load("docker-compose.yml")["services"]["server"]["command"][1]
