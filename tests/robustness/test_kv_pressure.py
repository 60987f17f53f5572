"""Case 26 of the fault list: KV memory for hardly more than one long request. Preemption changes no output."""

from __future__ import annotations

from typing import Any

from tests.robustness.servers import MODEL, PROMPTS, FaultServer, in_background
from tests.summary import figure

OPTIONS: list[dict[str, Any]] = [
    {"collaboration": {"policy": "random", "rate": 0.5}},
    {"collaboration": {"policy": "always"}},
    {},
    {"temperature": 1.0, "collaboration": {"policy": "sample"}},
    {"model": f"{MODEL}/codes"},
    {"repetition_penalty": 1.2, "collaboration": {"policy": "random", "rate": 0.3}},
    {"collaboration": {"policy": "confidence"}},
    {"model": f"{MODEL}/base", "temperature": 0.7},
]


def _answers(server: FaultServer) -> list[str]:
    with in_background(8) as submit:
        futures = [
            submit(server, False, PROMPTS[number], max_tokens=600, ignore_eos=True, seed=7, **options)
            for number, options in enumerate(OPTIONS)
        ]
        outcomes = [future.result() for future in futures]
    assert [outcome.status for outcome in outcomes] == [200] * len(OPTIONS), outcomes
    return [outcome.events[0]["choices"][0]["text"] for outcome in outcomes]


def test_26_preempted_output_is_the_same(tight: FaultServer, live: FaultServer) -> None:
    """Requests of 600 tokens share memory for one and a half, against the same on a server with plenty. Parked rows
    are among the preempted: whenever one lane steps, the rows that wait for it are parked in the other.
    """
    names = {lane: f"collm_lane_preemptions_total{{lane={lane}}}" for lane in ("base", "codes")}
    before = {lane: tight.metric(name) for lane, name in names.items()}
    assert _answers(tight) == _answers(live)
    for lane, name in names.items():
        assert live.metric(name) == 0
        assert tight.metric(name) > before[lane]
        figure(
            f"26: {tight.metric(name) - before[lane]:.0f} preemptions in the lane {lane}, none with plenty of memory"
        )
    tight.check_good()
    live.check_good()
