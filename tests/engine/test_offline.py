"""The engine for scripts, against brute force: a real engine process with stand-in lanes."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from pathlib import Path

import pytest

from engine.config import EngineConfig, LaneConfig, SchedulerConfig
from engine.errors import EngineDeadError, EngineStartupError
from engine.offline import Engine
from engine.types import Completion
from tests.engine.builders import mixed_requests, request, standin_config
from tests.engine.oracle import Pair, check

PAIR = Pair(experts=2, max_num_seqs=16)


@pytest.mark.parametrize("coordination", ["lockstep", "overlapped"])
def test_two_hundred_mixed_requests_equal_brute_force(coordination: str) -> None:
    requests = mixed_requests(200, PAIR)
    done: list[Completion] = []
    with Engine(standin_config(PAIR, coordination, token_budget=48, kv_tokens=300)) as engine:
        assert engine.info.coordination == coordination
        completions = engine.generate(requests, on_done=done.append)
        stats = engine.stats
    assert [completion.request_id for completion in completions] == [one.request_id for one in requests]
    for completion, one in zip(completions, requests, strict=True):
        check(completion, one, PAIR)
    assert sorted(map(id, done)) == sorted(map(id, completions))
    assert {"stop", "length", "error"} == {completion.finish_reason for completion in completions}
    assert stats.integrity_errors == 0


def test_what_the_engine_says_of_itself() -> None:
    with Engine(standin_config(Pair(experts=1, max_model_len=48, threshold=0.3))) as engine:
        info = engine.info
        assert [lane.name for lane in info.lanes] == ["base", "expert-1"]
        assert (info.vocab_size, info.max_model_len, info.eos_token_ids) == (16, 48, [0])
        assert info.gate is not None
        assert (info.gate.policy, info.gate.threshold) == ("threshold", 0.3)


def test_one_that_fails_does_not_stop_the_others() -> None:
    with Engine(standin_config(PAIR)) as engine:
        requests = [request("bad", [16]), request("good"), request("empty", []), request("good")]
        bad, good, empty, twice = engine.generate(requests)
        assert bad.error == "prompt has a token id outside [0, 16)"
        assert empty.error == "prompt is empty"
        assert twice.error == "request_id 'good' is already in use"
        check(good, requests[1], PAIR)
        assert engine.generate([]) == []


def test_a_dead_engine_is_an_error_and_shuts_down() -> None:
    engine = Engine(standin_config(PAIR, step_seconds=0.02))
    kill = threading.Timer(0.3, os.kill, (engine.client.pid, signal.SIGKILL))
    kill.start()
    try:
        with pytest.raises(EngineDeadError, match="-9"):
            engine.generate([request(str(number), max_tokens=60, policy="always") for number in range(400)])
        with pytest.raises(EngineDeadError):
            engine.generate([request()])
    finally:
        kill.join()
        engine.shutdown()
    engine.shutdown()


def test_a_refused_configuration_is_one_line_and_leaves_nothing(
    short_tmp: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = standin_config(PAIR)
    no_module, no_backend = (
        EngineConfig(base=LaneConfig(model="base", backend=backend)) for backend in ("nowhere.lanes", "string")
    )
    unknown_option = standin_config(PAIR, tokens_budget=3)
    # As only another version of this package could send it.
    bad_value = good.model_copy(update={"scheduler": SchedulerConfig.model_construct(max_num_seqs=0)})
    for config, named in (
        (unknown_option, "tokens_budget"),
        (bad_value, "scheduler.max_num_seqs"),
        (no_module, "backend: .*nowhere"),
        (no_backend, "backend: .*'string' has no function 'load'"),
    ):
        with pytest.raises(EngineStartupError, match=named) as caught:
            Engine(config)
        assert "\n" not in str(caught.value)
    assert list(short_tmp.iterdir()) == []
    capfd.readouterr()


def test_no_folder_is_left(short_tmp: Path) -> None:
    with Engine(standin_config(PAIR)) as engine:
        assert len(list(short_tmp.iterdir())) == 1
        engine.generate([request()])
    assert list(short_tmp.iterdir()) == []


def test_many_engines_side_by_side() -> None:
    with Engine(standin_config(PAIR)) as one, Engine(standin_config(Pair(experts=0))) as other:
        assert one.info.policy == "threshold"
        assert one.info.thresholds == {"threshold": PAIR.threshold, "confidence": 0.5}
        check(one.generate([request()])[0], request(), PAIR)
        check(other.generate([request()])[0], request(), Pair(experts=0))


def test_the_folder_of_the_sockets_is_private(short_tmp: Path) -> None:
    with Engine(standin_config(PAIR)):
        (folder,) = short_tmp.iterdir()
        assert folder.stat().st_mode & 0o077 == 0
    assert tempfile.gettempdir() == str(short_tmp)
