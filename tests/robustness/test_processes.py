"""Cases 21, 22 and 25 of the fault list: processes that are killed, stopped, or told to end."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.robustness.servers import LONG, MODEL, PROMPTS, FaultServer, Outcome, in_background, serving
from tests.summary import figure
from tests.waiting import eventually

GENEROUS = 20.0
"""Seconds for what should take one; this machine may be busy."""

STEP_TIMEOUT = 10.0
"""Of the servers whose lanes are stopped, in seconds: far more than a healthy step takes."""


def _under_way(server: FaultServer, submit: Any, count: int = 6, **fields: Any) -> list[Future[Outcome]]:
    """Long requests, half of them streamed, that both lanes are busy with."""
    before = server.metric("collm_lane_step_seconds_count{lane=codes}")
    futures = [submit(server, number % 2 == 0, PROMPTS[number], **LONG | fields) for number in range(count)]
    eventually(lambda: server.metric("collm_lane_step_seconds_count{lane=codes}") > before + 10)
    # All of them: one that comes after the fault is another case.
    gauges = ("collm_requests_running{}", "collm_requests_waiting{}")
    eventually(lambda: sum(map(server.metric, gauges)) >= count * fields.get("n", 1))
    return futures


def _end_in_errors(futures: list[Future[Outcome]], since: float, what: str) -> None:
    """All have ended soon, each with a 500 or with an error event as its stream's last."""
    finished, unfinished = wait(futures, timeout=GENEROUS)
    assert not unfinished
    outcomes = [future.result() for future in finished]
    figure(f"21: {what}: requests in flight answered within {max(o.ended for o in outcomes) - since:.2f} s")
    for outcome in outcomes:
        assert outcome.error is not None, outcome
        assert outcome.error["code"] == "engine_dead"
        assert not outcome.done, "a stream that ended in an error must not look complete"
        assert outcome.status in (200, 500)
        if outcome.status == 200:
            assert "error" in outcome.events[-1]


def _gone(processes: list[psutil.Process]) -> None:
    """Nothing is left behind."""
    _, alive = psutil.wait_procs(processes, timeout=GENEROUS)
    assert not alive


def _kill_and_recover(server: FaultServer, victim: psutil.Process, what: str) -> None:
    """SIGKILL with requests in flight, on a server that restarts its engine."""
    server.check_good()
    old = server.engine().children(recursive=True)
    with in_background(6) as submit:
        futures = _under_way(server, submit)
        victim.kill()
        killed = time.monotonic()
        eventually(lambda: not server.is_ready())
        _end_in_errors(futures, killed, what)
    server.wait_ready()
    figure(f"21: {what}: ready again after {time.monotonic() - killed:.1f} s")
    _gone(old)
    server.check_good()
    assert server.metric("collm_lane_up{lane=base}") == 1


@pytest.fixture(scope="module")
def restarting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultServer]:
    """Both lanes in the engine's process; another engine is started in the place of a dead one."""
    with serving(tmp_path_factory.mktemp("restarting"), server__on_engine_death="restart") as server:
        yield server


def test_21_engine_killed_and_restarted(restarting: FaultServer) -> None:
    _kill_and_recover(restarting, restarting.engine(), "engine process, SIGKILL")


@pytest.mark.slow
def test_21_engine_aborted_and_restarted(restarting: FaultServer) -> None:
    """As when native code fails."""
    engine = restarting.engine()
    with in_background(6) as submit:
        futures = _under_way(restarting, submit)
        engine.send_signal(signal.SIGABRT)
        killed = time.monotonic()
        _end_in_errors(futures, killed, "engine process, SIGABRT")
    restarting.wait_ready()
    restarting.check_good()


def test_25_sigterm_with_requests_in_flight(restarting: FaultServer) -> None:
    """In flight: finished, and right. Late: 503. Ready: 503 at once. Then exit 0. Must be this server's last test."""
    alone = restarting.text(PROMPTS[0], max_tokens=700, ignore_eos=True, seed=1, collaboration=LONG["collaboration"])
    tree = restarting.tree()
    with in_background(8) as submit:
        futures = _under_way(restarting, submit, count=4, max_tokens=700, seed=1)
        restarting.process.terminate()
        told = time.monotonic()
        eventually(lambda: restarting.status_of("/ready") == 503)
        figure(f"25: /ready is 503 {time.monotonic() - told:.2f} s after SIGTERM")
        assert restarting.status_of("/health") == 200
        for stream in (False, True):
            late = submit(restarting, stream, PROMPTS[0], max_tokens=4).result()
            assert late.status == 503
            assert late.error is not None
            assert late.error["code"] == "not_ready"
        outcomes = [future.result() for future in futures]
    assert [outcome.error for outcome in outcomes] == [None] * 4
    assert [outcome.status for outcome in outcomes] == [200] * 4
    assert all(outcome.done for outcome in outcomes[::2])
    text = "".join(c["text"] for event in outcomes[0].events[:-1] for c in event["choices"])
    assert text == alone
    assert restarting.process.wait(timeout=60) == 0
    _gone(tree)


@pytest.mark.slow  # every time, with lanes that are stand-ins: tests/server/test_lifecycle.py
def test_21_engine_killed_and_exit(tmp_path: Path) -> None:
    with serving(tmp_path, server__on_engine_death="exit") as server, in_background(6) as submit:
        tree = server.tree()
        futures = _under_way(server, submit)
        server.engine().kill()
        killed = time.monotonic()
        _end_in_errors(futures, killed, "engine process, SIGKILL, exit")
        assert server.process.wait(timeout=60) not in (0, None)
        figure(f"21: engine process, SIGKILL, exit: server ended after {time.monotonic() - killed:.1f} s")
        assert "error: the engine died" in server.output()
        _gone(tree)


@pytest.mark.slow
def test_21_http_process_killed(tmp_path: Path) -> None:
    """Nobody is left who could end the engine; it ends by itself."""
    with serving(tmp_path) as server:
        tree = server.tree()
        server.process.kill()
        server.process.wait()
        _gone(tree)


@pytest.mark.slow  # every time, with lanes that are stand-ins: tests/server/test_lifecycle.py
def test_25_a_second_sigterm_ends_at_once(tmp_path: Path) -> None:
    with serving(tmp_path) as server, in_background(4) as submit:
        tree = server.tree()
        # Many long ones: a drain would take a while.
        futures = _under_way(server, submit, count=4, n=8)
        server.process.terminate()
        eventually(lambda: server.status_of("/ready") == 503)
        assert server.process.poll() is None
        server.process.terminate()
        second = time.monotonic()
        assert server.process.wait(timeout=60) == 128 + signal.SIGTERM
        figure(f"25: ended {time.monotonic() - second:.1f} s after the second SIGTERM")
        for future in futures:
            assert not future.result().done
        _gone(tree)


# -- worker processes -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultServer]:
    """Each lane in a worker process of its own (executor mp)."""
    with serving(
        tmp_path_factory.mktemp("workers"),
        base__executor="mp",
        experts__executor="mp",
        scheduler__step_timeout_seconds=STEP_TIMEOUT,
        server__on_engine_death="restart",
    ) as server:
        assert len(server.workers()) == 2
        yield server


@pytest.mark.slow
def test_21_base_worker_killed(with_workers: FaultServer) -> None:
    _kill_and_recover(with_workers, with_workers.workers()[0], "base's worker, SIGKILL")


@pytest.mark.slow
def test_21_expert_worker_killed(with_workers: FaultServer) -> None:
    _kill_and_recover(with_workers, with_workers.workers()[1], "expert's worker, SIGKILL")


@pytest.mark.slow
def test_22_a_short_stop_is_survived(with_workers: FaultServer) -> None:
    """A worker that is stopped and goes on has lost nothing: the answers are what they would have been."""
    alone = with_workers.text(PROMPTS[0], max_tokens=200, ignore_eos=True)
    worker = with_workers.workers()[1]
    with in_background(4) as submit:
        futures = [submit(with_workers, False, PROMPTS[0], max_tokens=200, ignore_eos=True) for _ in range(4)]
        worker.suspend()
        time.sleep(2)
        worker.resume()
        for future in futures:
            assert future.result().events[0]["choices"][0]["text"] == alone
    with_workers.check_good()


@pytest.mark.slow
def test_22_expert_stopped(with_workers: FaultServer) -> None:
    """A step that does not end: what needs the expert gets 504 or an error event, what does not goes on. When the
    worker goes on, so does the lane.
    """
    worker = with_workers.workers()[1]
    failures = with_workers.metric("collm_expert_failures_total{}")
    with in_background(6) as submit:
        futures = _under_way(with_workers, submit)
        worker.suspend()
        stopped = time.monotonic()
        try:
            finished, unfinished = wait(futures, timeout=STEP_TIMEOUT + GENEROUS)
            assert not unfinished
            figure(f"22: expert's worker stopped, timeout {STEP_TIMEOUT:g} s: all answered within "
                   f"{max(future.result().ended for future in finished) - stopped:.1f} s")  # fmt: skip
            for future in finished:
                outcome = future.result()
                assert outcome.error is not None
                assert outcome.error["code"] == "step_timeout"
                assert outcome.status in (200, 504)
                assert not outcome.done
            assert with_workers.metric("collm_lane_up{lane=codes}") == 0
            assert with_workers.metric("collm_expert_failures_total{}") > failures
            assert with_workers.text(PROMPTS[0], model=f"{MODEL}/base", max_tokens=8)
            assert with_workers.complete(model=f"{MODEL}/codes", max_tokens=8).status_code == 504
        finally:
            worker.resume()
    eventually(lambda: with_workers.metric("collm_lane_up{lane=codes}") == 1)
    with_workers.check_good()


@pytest.mark.slow
def test_22_expert_stopped_and_the_base_goes_on(tmp_path: Path) -> None:
    """``expert_failure = "base"``: the base writes what the expert would have, and it is counted."""
    with serving(
        tmp_path,
        experts__executor="mp",
        scheduler__step_timeout_seconds=STEP_TIMEOUT,
        scheduler__expert_failure="base",
    ) as server:
        (worker,) = server.workers()
        with in_background(4) as submit:
            futures = _under_way(server, submit, count=4, max_tokens=300)
            worker.suspend()
            try:
                finished, unfinished = wait(futures, timeout=STEP_TIMEOUT + 60)
            finally:
                worker.resume()
            assert not unfinished
            assert all(future.result().status == 200 and future.result().error is None for future in finished)
            assert all(future.result().done for future in futures[::2])
        assert server.metric("collm_expert_failures_total{}") > 0
        eventually(lambda: server.metric("collm_lane_up{lane=codes}") == 1)
        server.check_good()


@pytest.mark.slow
def test_22_engine_process_stopped(tmp_path: Path) -> None:
    """Lanes in the engine's process cannot be watched from within: the engine is given up, and another one started."""
    with (
        serving(tmp_path, scheduler__step_timeout_seconds=STEP_TIMEOUT, server__on_engine_death="restart") as server,
        in_background(6) as submit,
    ):
        engine = server.engine()
        futures = _under_way(server, submit)
        engine.suspend()
        finished, unfinished = wait(futures, timeout=STEP_TIMEOUT + GENEROUS)
        assert not unfinished
        for future in finished:
            error = future.result().error
            assert error is not None
            assert error["code"] in ("engine_dead", "step_timeout")
        _gone([engine])
        server.wait_ready()
        server.check_good()
