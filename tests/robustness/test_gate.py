"""Case 23 of the fault list: a gate whose values overflow. A request error, counted; never a silent decision.

The artifact's own values must be finite or it is refused, so this one's are as large as float32 has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.robustness.servers import MODEL, PROMPTS, FaultServer, gate_of_codes, in_background, serving
from tests.waiting import eventually


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultServer]:
    directory = tmp_path_factory.mktemp("gate")
    gate = gate_of_codes()
    replace(gate, theta=torch.full_like(gate.theta, 3e38)).save(directory / "gate")
    with serving(directory, gate__path=str(directory / "gate")) as server:
        yield server


@pytest.mark.parametrize("policy", ["always", "never", "random", "confidence"])
def test_23_policies_that_need_no_gate_go_on(overflowing: FaultServer, policy: str) -> None:
    """What the gate would have said is reported as null, and is no observation of the histogram."""
    errors = overflowing.metric("collm_gate_errors_total{}")
    observed = overflowing.metric("collm_deferral_probability_count{}")
    response = overflowing.complete(
        max_tokens=8, ignore_eos=True, seed=1, collaboration={"policy": policy, "report": True}
    )
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    values = choice["collaboration"]["deferral_probabilities"]
    needs_no_more = policy == "confidence"  # reports the base's own probability
    assert [value is not None for value in values] == [needs_no_more] * 8
    expected = {"always": {"codes"}, "never": {"base"}}.get(policy, {"base", "codes"})
    assert set(choice["collaboration"]["sources"]) <= expected
    assert overflowing.metric("collm_gate_errors_total{}") == errors
    assert overflowing.metric("collm_deferral_probability_count{}") - observed == 8 * needs_no_more


def _check_alive(server: FaultServer) -> None:
    """Members alone ask no gate; they go on."""
    for member in ("base", "codes"):
        assert server.text(PROMPTS[0], model=f"{MODEL}/{member}", max_tokens=8)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("policy", ["threshold", "sample"])
def test_23_gate_values_that_are_not_finite(overflowing: FaultServer, policy: str, stream: bool) -> None:
    errors, tokens = overflowing.metric("collm_gate_errors_total{}"), _tokens(overflowing)
    with in_background(4) as submit:
        futures = [
            submit(overflowing, stream, PROMPTS[number], max_tokens=8, collaboration={"policy": policy})
            for number in range(4)
        ]
        outcomes = [future.result() for future in futures]
    for outcome in outcomes:
        assert outcome.status == 500
        assert outcome.error is not None
        assert outcome.error["code"] == "request_failed"
        assert "gate" in outcome.error["message"]
    assert overflowing.metric("collm_gate_errors_total{}") == errors + 4
    assert _tokens(overflowing) == tokens
    _check_alive(overflowing)
    eventually(overflowing.is_empty)


def test_23_others_in_the_batch_are_not_touched(overflowing: FaultServer) -> None:
    with in_background(4) as submit:
        alone = submit(overflowing, False, PROMPTS[0], model=f"{MODEL}/base", max_tokens=200, ignore_eos=True).result()
        long = submit(overflowing, False, PROMPTS[0], model=f"{MODEL}/base", max_tokens=200, ignore_eos=True)
        failing = [submit(overflowing, False, PROMPTS[1], max_tokens=8) for _ in range(8)]
        assert [future.result().status for future in failing] == [500] * 8
        assert long.result().events[0]["choices"] == alone.events[0]["choices"]


def _tokens(server: FaultServer) -> float:
    return server.metric("collm_tokens_total{source=base}") + server.metric("collm_tokens_total{source=codes}")
