"""Forms are read by processes that can be killed; clients share them."""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from engine.grammar.checker import TOO_LONG, Checked, FormChecker
from engine.grammar.worker import Setup
from engine.supervisor import safe_environment
from engine.types import GenerationRequest, SamplingSpec, StructuredOutputs
from tests.packaging.sources import ROOT

PATIENCE = 60.0
EASY = StructuredOutputs(json='{"type": "boolean"}')


def slow(number: int) -> StructuredOutputs:
    """Takes longer than it may: the back end compares every two of its alternatives."""
    rules = "|".join(f'"{chr(0x4E00 + each)}"a' for each in range(12_000))
    return StructuredOutputs(grammar=f'root ::= "{number}" a\na ::= {rules}|"x"')


@pytest.fixture
def results() -> queue.SimpleQueue[Checked]:
    return queue.SimpleQueue()


@pytest.fixture
def checker_of(results: queue.SimpleQueue[Checked]) -> Iterator[Callable[..., FormChecker]]:
    made = []

    def make(seconds: int = 1, memory: int = 1 << 30, workers: int = 2) -> FormChecker:
        tokenizer = (ROOT / "models" / "demo" / "base" / "tokenizer.json").read_text()
        setup = Setup(tokenizer, 4096, 0, any_whitespace=True, seconds=seconds, memory=memory)
        made.append(FormChecker(setup, results.put, workers=workers, environment=safe_environment()))
        return made[-1]

    yield make
    for checker in made:
        checker.close()


def request(name: str, form: StructuredOutputs, client: str = "") -> GenerationRequest:
    return GenerationRequest(name, [1], SamplingSpec(structured_outputs=form), client=client)


def test_a_form_is_compiled_once_for_all_who_have_it(
    checker_of: Callable[..., FormChecker], results: queue.SimpleQueue[Checked]
) -> None:
    checker = checker_of()
    for number in range(5):
        assert checker.submit(request(f"{number}", EASY)) is None
    checked = results.get(timeout=PATIENCE)
    assert [each.request_id for each in checked.requests] == [f"{number}" for number in range(5)]
    again = checker.submit(request("again", EASY))
    assert again is not None
    assert again.template is checked.template is not None
    assert not checker.pending


def test_a_form_that_takes_too_much_is_refused_and_the_next_is_read(
    checker_of: Callable[..., FormChecker], results: queue.SimpleQueue[Checked]
) -> None:
    checker = checker_of(memory=1 << 20)
    names = [f"n{number}" for number in range(2500)]
    many = {"type": "object", "properties": {name: {} for name in names}, "required": names}
    checker.submit(request("many", StructuredOutputs(json=json.dumps(many))))
    assert results.get(timeout=PATIENCE).problem in (TOO_LONG, "the form takes too much memory")
    checker.submit(request("easy", EASY))
    assert results.get(timeout=PATIENCE).problem is None


def test_another_client_does_not_wait_for_one_that_keeps_the_workers_busy(
    checker_of: Callable[..., FormChecker], results: queue.SimpleQueue[Checked]
) -> None:
    checker = checker_of(seconds=600)
    checker.submit(request("warm", StructuredOutputs(json="{}")))
    results.get(timeout=PATIENCE)
    for number in range(20):
        checker.submit(request(f"slow-{number}", slow(number), client="greedy"))
    checker.submit(request("easy", EASY, client="other"))
    order = []
    while "easy" not in order:
        order += [each.request_id for each in results.get(timeout=PATIENCE).requests]
    # Its own worker was free, or the next one that became free: never behind the greedy client's line.
    assert len(order) <= 3


def test_a_form_that_nobody_waits_for_any_more_is_dropped(
    checker_of: Callable[..., FormChecker], results: queue.SimpleQueue[Checked]
) -> None:
    checker = checker_of(seconds=600)
    checker.submit(request("warm", EASY))
    results.get(timeout=PATIENCE)
    checker.submit(request("gone", slow(0), client="one"))
    time.sleep(0.1)  # it is being read by now
    checker.submit(request("gone too", slow(1), client="one"))
    checker.abort("gone")
    checker.abort("gone too")
    assert not checker.pending
    checker.submit(request("next", StructuredOutputs(regex="[ab]+"), client="one"))
    assert [each.request_id for each in results.get(timeout=PATIENCE).requests] == ["next"]


def test_a_worker_outlives_a_form_that_is_given_up_while_it_is_compiled(
    checker_of: Callable[..., FormChecker], results: queue.SimpleQueue[Checked], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended for a form that it had read already, it would have refused the next one's."""
    compiling, go_on = threading.Event(), threading.Event()
    compile_ = FormChecker._compile

    def waits(checker: FormChecker, grammar: str) -> tuple[object, str | None]:
        compiling.set()
        assert go_on.wait(PATIENCE)
        return compile_(checker, grammar)

    monkeypatch.setattr(FormChecker, "_compile", waits)
    checker = checker_of(workers=1)
    checker.submit(request("gone", EASY))
    assert compiling.wait(PATIENCE)
    checker.abort("gone")
    go_on.set()
    checker.submit(request("next", StructuredOutputs(regex="[ab]+")))
    assert results.get(timeout=PATIENCE).problem is None
    assert [process.poll() for process in checker._processes] == [None]


def test_a_worker_that_was_ended_while_idle_is_no_fault_of_the_next_form(
    checker_of: Callable[..., FormChecker], results: queue.SimpleQueue[Checked]
) -> None:
    checker = checker_of(workers=1)
    checker.submit(request("warm", EASY))
    results.get(timeout=PATIENCE)
    (worker,) = checker._processes
    worker.kill()
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # ended, and left for the checker to find
    checker.submit(request("next", StructuredOutputs(regex="[ab]+")))
    assert results.get(timeout=PATIENCE).problem is None
