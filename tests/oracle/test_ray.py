"""Base and expert in Ray workers on two nodes of a local cluster: the oracle's text, aborts, and a node that dies.

Ray's nodes are processes of this machine here. What crosses between them does so over TCP, as between machines.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.blends import Blend
from engine.config import EngineConfig
from engine.errors import EngineDeadError
from engine.offline import Engine
from engine.types import Collaboration, GenerationRequest, SamplingSpec
from tests.oracle import pairs
from tests.oracle.checks import abandon_at_any_moment, assert_empty, assert_same, run
from tests.oracle.reference import Written
from tests.packaging.sources import ROOT
from tests.waiting import eventually

pytestmark = pytest.mark.slow
pytest.importorskip("ray", reason="Ray is not installed: make install-ray")

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}
NOTICED_WITHIN = 60.0
"""Seconds from a node's death to the last error; vLLM looks after its workers every five."""


def _python_path(folder: Path) -> str:
    """PYTHONPATH for processes in which vLLM is to find the platform of ``ray_platform.py``."""
    described = folder / "collm_tests_ray_platform-0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: collm-tests-ray-platform\nVersion: 0\n")
    plugin = "ray_on_cpu = tests.oracle.ray_platform:register"
    (described / "entry_points.txt").write_text(f"[vllm.platform_plugins]\n{plugin}\n")
    return os.pathsep.join([str(folder), str(ROOT)])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head without devices, where the engine is, and two nodes with room for one worker each."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", _python_path(tmp_path_factory.mktemp("platform")))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_gpus": 0, "include_dashboard": False})
        try:
            for _ in range(2):
                cluster.add_node(**NODE, num_gpus=1)
            cluster.wait_for_nodes()
            patch.setenv("RAY_ADDRESS", cluster.address)
            yield cluster
        finally:
            cluster.shutdown()


@pytest.fixture(scope="module")
def engine(cluster: Any, random_pair: pairs.Served) -> Iterator[Engine]:
    fields = random_pair.config(executor="ray", coordination="auto").model_dump()
    fields["base"]["executor"] = "ray"
    with Engine(EngineConfig.model_validate(fields)) as engine:
        yield engine


def _workers() -> list[psutil.Process]:
    """Processes that hold a lane's model, on any node."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any("ray::RayWorkerProc" in part for part in process.info["cmdline"] or ()):
            found.append(process)
    return found


def _raylet(node: Any) -> int:
    (raylet,) = node.all_processes["raylet"]
    pid: int = raylet.process.pid
    return pid


def test_each_lane_has_a_node_of_its_own(engine: Engine, cluster: Any) -> None:
    assert engine.info.coordination == "overlapped"
    assert sorted(worker.ppid() for worker in _workers()) == sorted(map(_raylet, cluster.worker_nodes))


def test_greedy_text_is_the_oracles(engine: Engine, prompts: list[list[int]], written: list[Written]) -> None:
    requests = [
        GenerationRequest(f"greedy-{number}", prompt, SamplingSpec(temperature=0.0, max_tokens=50))
        for number, prompt in enumerate(prompts)
    ]
    assert_same(run(engine, requests, 32), written)
    assert_empty(engine)


def test_sampled_text_is_that_of_lanes_in_the_process(
    engine: Engine, plain_engine: Engine, prompts: list[list[int]]
) -> None:
    requests = [
        GenerationRequest(
            f"sampled-{number}",
            prompt,
            SamplingSpec(temperature=0.8, top_p=0.9, seed=number, max_tokens=30, logprobs=3),
            Collaboration(run_ahead=number % 3 * 2),
        )
        for number, prompt in enumerate(prompts[:16])
    ]
    for here, there in zip(run(plain_engine, requests, 16), run(engine, requests, 16), strict=True):
        assert here.error is None
        assert (here.tokens, here.sources) == (there.tokens, there.sources)
        assert here.logprobs is not None
        assert there.logprobs is not None
        for one, other in zip(here.logprobs, there.logprobs, strict=True):
            assert one.token_ids == other.token_ids
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert_empty(engine)


def test_abandoned_at_any_moment(engine: Engine, prompts: list[list[int]]) -> None:
    abandon_at_any_moment(engine, prompts, 60, seed=5)
    assert_empty(engine)


def test_a_blend_is_refused_by_name(engine: Engine, prompts: list[list[int]]) -> None:
    blend = Blend("mixture", ((0, 0.5), (1, 0.5)))
    request = GenerationRequest("blended", prompts[0], SamplingSpec(max_tokens=3), Collaboration(blend=blend))
    (completion,) = engine.generate([request])
    assert completion.finish_reason == "error"
    assert completion.error is not None
    assert "executor 'ray'" in completion.error


def test_a_node_that_dies_ends_the_engine_with_a_reason(engine: Engine, cluster: Any, prompts: list[list[int]]) -> None:
    """The last test of this file: nobody's text goes on without its lane, and nothing waits for a step for ever."""
    sampling = SamplingSpec(temperature=0.0, max_tokens=100, ignore_eos=True)

    def write(name: str) -> None:
        requests = [GenerationRequest(f"{name}-{number}", prompt, sampling) for number, prompt in enumerate(prompts)]
        assert all(completion.error is None for completion in engine.generate(requests))

    write("before")
    cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
    died = time.monotonic()
    with pytest.raises(EngineDeadError, match=r"a worker process of lane (base|expert1) died"):  # noqa: PT012
        while time.monotonic() < died + NOTICED_WITHIN:
            write(f"after-{time.monotonic() - died:.1f}")
    assert time.monotonic() < died + NOTICED_WITHIN
    with pytest.raises(EngineDeadError):
        write("later")
    engine.shutdown()
    # The other node's worker too: its device is free for the next engine.
    eventually(lambda: not _workers())
