"""The Kubernetes manifests: built by a real kustomize, valid by Kubernetes' own schemas, in line with the server."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.settings import Settings
from tests.deployment.sources import RULE_FILES, server_series
from tests.packaging.sources import ROOT

KUBERNETES = ROOT / "deploy/kubernetes"
BUILDS = ["base", "overlays/cpu", "overlays/one-gpu"]
VERSIONS = ["1.30", "1.34"]
"""Of Kubernetes, whose schemas the objects must fit."""

CUSTOM_KINDS = {
    "ServiceMonitor": "monitoring.coreos.com/v1",
    "PrometheusRule": "monitoring.coreos.com/v1",
    "ScaledObject": "keda.sh/v1alpha1",
}
"""Of the Prometheus operator and of KEDA: Kubernetes' schemas don't know them."""

LEFT_FOR_THE_END_S = 20
"""Seconds that the server may take after its drain: last answers, and the engine's end."""

Objects = dict[str, dict[str, Any]]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("COLLM_"):
            monkeypatch.delenv(name)


@functools.cache
def kustomize() -> list[str] | None:
    """The command that builds a kustomization."""
    if path := shutil.which("kustomize"):
        return [path, "build"]
    return [path, "kustomize"] if (path := shutil.which("kubectl")) else None


@functools.cache
def built(folder: str) -> Objects:
    """A kustomization's objects by kind. Each kind is there once at most."""
    command = kustomize()
    if command is None:
        pytest.skip("neither kustomize nor kubectl is here")
    result = subprocess.run([*command, KUBERNETES / folder], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "deprecated" not in result.stderr.lower(), result.stderr
    objects = list(yaml.safe_load_all(result.stdout))
    kinds = [item["kind"] for item in objects]
    assert len(kinds) == len(set(kinds))
    return dict(zip(kinds, objects, strict=True))


def manifests() -> list[Path]:
    """The files of the base, and the examples, that are whole objects."""
    names = yaml.safe_load((KUBERNETES / "base/kustomization.yaml").read_text())["resources"]
    return [*(KUBERNETES / "base" / name for name in names), *sorted((KUBERNETES / "examples").glob("*.yaml"))]


def example(name: str) -> dict[str, Any]:
    """One of the objects that are applied by hand."""
    return yaml.safe_load((KUBERNETES / "examples" / name).read_text())  # type: ignore[no-any-return]


def validate(item: dict[str, Any], version: str) -> None:
    """Against the bundled schemas; unknown fields are errors."""
    module = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    module.validate(item, version, strict=True)


def pod(objects: Objects) -> dict[str, Any]:
    return objects["Deployment"]["spec"]["template"]["spec"]  # type: ignore[no-any-return]


def container(objects: Objects) -> dict[str, Any]:
    [only] = pod(objects)["containers"]
    return only  # type: ignore[no-any-return]


def settings(objects: Objects, folder: Path) -> Settings:
    """What the server makes of the configuration in the config map."""
    file = folder / "collm.toml"
    file.write_text(objects["ConfigMap"]["data"]["collm.toml"])
    return Settings(config=file)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", manifests(), ids=lambda path: path.name)
def test_manifest_is_valid(path: Path, version: str) -> None:
    """Each file by itself: needs no kustomize."""
    [item] = yaml.safe_load_all(path.read_text())
    if item["kind"] in CUSTOM_KINDS:
        assert item["apiVersion"] == CUSTOM_KINDS[item["kind"]]
    else:
        validate(item, version)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("folder", BUILDS)
def test_build_is_valid(folder: str, version: str) -> None:
    for kind, item in built(folder).items():
        assert item["kind"] == "Namespace" or item["metadata"]["namespace"] == "collm"
        if kind not in CUSTOM_KINDS:
            validate(item, version)


def test_validation_can_fail() -> None:
    module = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    item = yaml.safe_load((KUBERNETES / "base/deployment.yaml").read_text())
    item["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    with pytest.raises(module.ValidationError):
        validate(item, VERSIONS[0])


def test_rule_object_is_what_the_rules_make() -> None:
    command = [sys.executable, "-B", str(KUBERNETES / "generate.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    groups = [group for path in RULE_FILES for group in yaml.safe_load(path.read_text())["groups"]]
    assert yaml.safe_load((KUBERNETES / "base/prometheusrule.yaml").read_text())["spec"] == {"groups": groups}


@pytest.mark.parametrize("folder", BUILDS)
def test_grace_period_covers_the_drain(folder: str, tmp_path: Path) -> None:
    objects = built(folder)
    [sleep, seconds] = container(objects)["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep == "sleep"
    drain = settings(objects, tmp_path).server.drain_timeout_s
    assert pod(objects)["terminationGracePeriodSeconds"] >= int(seconds) + drain + LEFT_FOR_THE_END_S


@pytest.mark.parametrize(("folder", "example"), [("base", "example-gpu.toml"), ("overlays/cpu", "demo.toml")])
def test_configuration_is_that_of_the_example(folder: str, example: str, tmp_path: Path) -> None:
    mine = settings(built(folder), tmp_path)
    shipped = Settings(config=ROOT / "deploy/config" / example)
    assert mine.served_model_name == shipped.served_model_name
    assert mine.engine.lane_names == shipped.engine.lane_names

    def in_image(path: str | None) -> str | None:
        return path and path.removeprefix(f"{ROOT}/")

    assert [lane.model for lane in mine.engine.lanes] == [in_image(lane.model) for lane in shipped.engine.lanes]
    assert mine.gate == shipped.gate.model_copy(update={"path": in_image(shipped.gate.path)})
    assert mine.scheduler == shipped.scheduler


def test_the_demo_pair_is_configured_as_everywhere() -> None:
    """Needs no kustomize. The overlay has what demo.toml has, but for what a GPU needs and a pod must say."""
    demo = tomllib.loads((ROOT / "deploy/config/demo.toml").read_text())
    mine = tomllib.loads((KUBERNETES / "overlays/cpu/config/collm.toml").read_text())
    one_gpu = tomllib.loads((KUBERNETES / "overlays/one-gpu/config/collm.toml").read_text())
    for lane in (demo["base"], *demo["experts"], one_gpu["base"], *one_gpu["experts"]):
        del lane["vllm"]["gpu_memory_utilization"]
        lane["model"] = lane["model"].removeprefix("../../")
    demo["gate"]["path"] = demo["gate"]["path"].removeprefix("../../")
    assert set(mine.pop("server")) == {"drain_timeout_s"}
    assert mine == demo
    assert set(one_gpu.pop("server")) == {"drain_timeout_s"}
    assert one_gpu == demo


def test_sources_of_config_maps_are_valid_toml() -> None:
    """Needs no kustomize."""
    for folder in BUILDS:
        assert tomllib.loads((KUBERNETES / folder / "config/collm.toml").read_text())["experts"]


@pytest.mark.parametrize("folder", BUILDS)
def test_probes_ask_routes_of_the_server(folder: str) -> None:
    server = container(built(folder))
    [port] = server["ports"]
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"EXPOSE {port['containerPort']}\n" in dockerfile
    assert f'"--host", "0.0.0.0", "--port", "{port["containerPort"]}"' in dockerfile
    paths = {name: server[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/ready", "liveness": "/health", "readiness": "/ready"}
    assert {server[f"{name}Probe"]["httpGet"]["port"] for name in paths} == {port["name"]}
    routes = (ROOT / "server/routes/ops.py").read_text()
    assert all(f'@router.get("{path}"' in routes for path in paths.values())


@pytest.mark.parametrize("folder", BUILDS)
def test_pod_has_no_rights(folder: str) -> None:
    objects = built(folder)
    user = re.search(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.M)
    assert user is not None
    context = pod(objects)["securityContext"]
    assert context["runAsNonRoot"]
    assert (str(context["runAsUser"]), str(context["runAsGroup"])) == user.groups()
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    own = container(objects)["securityContext"]
    assert own["readOnlyRootFilesystem"]
    assert own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert pod(objects)["automountServiceAccountToken"] is False
    # Else a service named collm sets COLLM_..., the prefix of the server's settings.
    assert pod(objects)["enableServiceLinks"] is False


@pytest.mark.parametrize("folder", BUILDS)
def test_volumes(folder: str) -> None:
    objects = built(folder)
    volumes = {volume["name"]: volume for volume in pod(objects)["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in container(objects)["volumeMounts"]}
    assert {mount["name"] for mount in mounts.values()} == set(volumes)
    assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"
    for writable in ("/tmp", "/var/cache/collm"):
        assert "emptyDir" in volumes[mounts[writable]["name"]]
    assert volumes["config"]["configMap"]["name"] == objects["ConfigMap"]["metadata"]["name"]
    assert container(objects)["args"] == ["--config", "/etc/collm/collm.toml"]
    assert mounts["/etc/collm"]["readOnly"]


def test_base_has_a_gpu_and_its_models() -> None:
    objects = built("base")
    assert container(objects)["resources"]["limits"]["nvidia.com/gpu"] == "1"
    claims = [
        volume["persistentVolumeClaim"] for volume in pod(objects)["volumes"] if "persistentVolumeClaim" in volume
    ]
    assert claims == [{"claimName": objects["PersistentVolumeClaim"]["metadata"]["name"], "readOnly": True}]
    assert container(objects)["image"] == "collm:gpu"


def test_cpu_overlay_has_neither() -> None:
    objects = built("overlays/cpu")
    assert "gpu" not in yaml.safe_dump(pod(objects))
    assert {"PersistentVolumeClaim", "HorizontalPodAutoscaler"} & set(objects) == set()
    assert container(objects)["image"] == "collm:cpu"
    assert objects["Deployment"]["spec"]["replicas"] == 1


@pytest.mark.parametrize("folder", BUILDS)
def test_everything_selects_the_pods(folder: str) -> None:
    objects = built(folder)
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for selector in (
        objects["Deployment"]["spec"]["selector"]["matchLabels"],
        objects["Service"]["spec"]["selector"],
        objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector
        assert selector.items() <= labels.items()
    monitor = objects["ServiceMonitor"]["spec"]
    assert monitor["selector"]["matchLabels"].items() <= objects["Service"]["metadata"]["labels"].items()
    [port] = objects["Service"]["spec"]["ports"]
    assert port["targetPort"] == container(objects)["ports"][0]["name"]
    assert [endpoint["port"] for endpoint in monitor["endpoints"]] == [port["name"]]
    assert [endpoint["path"] for endpoint in monitor["endpoints"]] == ["/metrics"]


def test_one_gpu_overlay_has_a_gpu_and_the_demo_pair() -> None:
    objects = built("overlays/one-gpu")
    assert container(objects)["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container(objects)["image"] == "collm:gpu"
    assert {"PersistentVolumeClaim", "HorizontalPodAutoscaler"} & set(objects) == set()
    assert objects["Deployment"]["spec"]["replicas"] == 1


def test_examples_fit_the_base() -> None:
    """They are applied by hand: nobody would notice a name that is not there."""
    names = {
        item["kind"]: item
        for item in (
            yaml.safe_load((KUBERNETES / "base" / f"{name}.yaml").read_text())
            for name in ("service", "deployment", "models", "networkpolicy", "hpa")
        )
    }
    [rule] = example("ingress.yaml")["spec"]["rules"]
    [path] = rule["http"]["paths"]
    backend = path["backend"]["service"]
    assert backend["name"] == names["Service"]["metadata"]["name"]
    assert backend["port"]["name"] in [port["name"] for port in names["Service"]["spec"]["ports"]]
    keda, hpa = example("keda.yaml")["spec"], names["HorizontalPodAutoscaler"]["spec"]
    assert keda["scaleTargetRef"]["name"] == names["Deployment"]["metadata"]["name"]
    assert (keda["minReplicaCount"], keda["maxReplicaCount"]) == (hpa["minReplicas"], hpa["maxReplicas"])
    [trigger] = keda["triggers"]
    assert set(re.findall(r"collm_\w+", trigger["metadata"]["query"])) <= set(server_series())
    job = example("download-models.yaml")["spec"]["template"]["spec"]
    claims = [
        volume["persistentVolumeClaim"]["claimName"]
        for volume in job["volumes"]
        if len(volume) == 2 and "persistentVolumeClaim" in volume
    ]
    assert claims == [names["PersistentVolumeClaim"]["metadata"]["name"]]
    folders = re.findall(r"--local-dir (\S+)", job["containers"][0]["args"][0])
    served = tomllib.loads((KUBERNETES / "base/config/collm.toml").read_text())
    assert folders == [served["base"]["model"], *(expert["model"] for expert in served["experts"])]
    [ingress] = names["NetworkPolicy"]["spec"]["ingress"]
    [port] = names["Deployment"]["spec"]["template"]["spec"]["containers"][0]["ports"]
    assert [allowed["port"] for allowed in ingress["ports"]] == [port["name"]]


def test_autoscaler_looks_at_the_queue() -> None:
    objects = built("base")
    spec = objects["HorizontalPodAutoscaler"]["spec"]
    assert spec["scaleTargetRef"]["name"] == objects["Deployment"]["metadata"]["name"]
    # The autoscaler's number would be reset by every apply.
    assert "replicas" not in objects["Deployment"]["spec"]
    [metric] = spec["metrics"]
    assert metric["pods"]["metric"]["name"] == "collm_requests_waiting"
    assert metric["pods"]["metric"]["name"] in server_series()


def test_monitor_scrapes_as_often_as_the_dashboard_thinks() -> None:
    monitor = yaml.safe_load((KUBERNETES / "base/servicemonitor.yaml").read_text())
    prometheus = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    assert [endpoint["interval"] for endpoint in monitor["spec"]["endpoints"]] == [
        prometheus["global"]["scrape_interval"]
    ]
