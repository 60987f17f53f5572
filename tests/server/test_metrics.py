from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.stats import EngineStats, LaneStats
from engine.types import Cost, Delta, GenerationRequest
from server import __version__
from tests.server.conftest import Build, House
from tests.server.fakes import deltas_of, letters, waits_forever
from tests.waiting import until

PROMISED = {
    "collm_tokens", "collm_prompt_tokens", "collm_requests", "collm_requests_running", "collm_requests_waiting",
    "collm_deferral_probability", "collm_request_deferral_rate", "collm_deferral_run_length",
    "collm_lane_step_seconds", "collm_lane_batch_rows", "collm_lane_catchup_tokens", "collm_lane_kv_cache_usage_ratio",
    "collm_lane_preemptions", "collm_lane_up", "collm_expert_wait_seconds", "collm_runahead_tokens",
    "collm_time_to_first_token_seconds", "collm_inter_token_seconds", "collm_request_seconds", "collm_http_requests",
    "collm_build_info", "collm_gate_errors", "collm_integrity_errors", "collm_expert_failures",
    "collm_request_queue_seconds", "collm_request_prompt_tokens", "collm_request_generation_tokens",
    "collm_max_requests_running", "collm_max_requests_waiting", "collm_lane_kv_cache_tokens",
    "collm_lane_computed_tokens", "collm_lane_prompt_tokens", "collm_lane_prefix_cache_queries",
    "collm_lane_prefix_cache_hits", "collm_default_threshold", "collm_engine_active_seconds",
    "collm_engine_lane_seconds",
    *(
        f"{whose}process_{what}"
        for whose in ("", "collm_engine_")
        for what in (
            "virtual_memory_bytes", "resident_memory_bytes", "start_time_seconds", "cpu_seconds", "open_fds", "max_fds",
        )
    ),
    "collm_unaligned_deferrals", "collm_vetoed_tokens", "collm_regretted_tokens", "collm_revoked_tokens",
    "collm_lane_device_seconds",
}  # fmt: skip
JOINT = {"model_name": "collm-demo"}


async def test_all_promised_metrics_are_there_and_nothing_twice(house: House) -> None:
    await house.complete(max_tokens=4)
    response = await house.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = [family.name for family in text_string_to_metric_families(response.text)]
    assert len(families) == len(set(families))
    assert {name for name in families if not name.endswith("_created")} == PROMISED
    text = response.text
    for counted in (
        "tokens",
        "prompt_tokens",
        "requests",
        "lane_catchup_tokens",
        "lane_preemptions",
        "runahead_tokens",
    ):
        sample = f"collm_{counted}_total"
        assert f"\n{sample}{{" in text, sample


async def test_two_servers_in_one_process_do_not_share_metrics(build: Build) -> None:
    one, two = await build(), await build()
    await one.complete(max_tokens=2)
    assert await one.metric("collm_requests_total", outcome="length", **JOINT) == 1
    assert await two.metric("collm_requests_total", outcome="length", **JOINT) == 0


async def test_tokens_by_source_and_model(house: House) -> None:
    await house.complete(max_tokens=5)
    await house.complete(model="collm-demo/codes", max_tokens=3)
    tokens = "collm_tokens_total"
    assert await house.metric(tokens, source="base", policy="threshold", **JOINT) == 3
    assert await house.metric(tokens, source="codes", policy="threshold", **JOINT) == 2
    assert await house.metric(tokens, source="codes", policy="alone", model_name="collm-demo/codes") == 3
    prompt = len(house.engine.seen[0].prompt)
    assert await house.metric("collm_prompt_tokens_total", **JOINT) == prompt


async def test_deferral_rate_runs_and_probabilities(build: Build) -> None:
    sources = [0, 1, 1, 1, 0, 1, 1]

    def script(request: GenerationRequest) -> list[Delta]:
        return deltas_of(request, letters("abcdefg"), sources=sources)

    house = await build(script)
    await house.complete(max_tokens=7)
    assert await house.metric("collm_request_deferral_rate_sum", policy="threshold", **JOINT) == pytest.approx(5 / 7)
    assert await house.metric("collm_deferral_run_length_count", **JOINT) == 2
    assert await house.metric("collm_deferral_run_length_sum", **JOINT) == 5
    assert await house.metric("collm_deferral_run_length_bucket", le="2.0", **JOINT) == 1
    assert await house.metric("collm_deferral_probability_count", **JOINT) == 7
    assert await house.metric("collm_time_to_first_token_seconds_count", **JOINT) == 1
    assert await house.metric("collm_inter_token_seconds_count", **JOINT) == 6
    assert await house.metric("collm_request_seconds_count", **JOINT) == 1


async def test_a_member_alone_has_no_deferral_rate(house: House) -> None:
    await house.complete(model="collm-demo/codes")
    model = {"model_name": "collm-demo/codes"}
    assert await house.metric("collm_request_deferral_rate_count", policy="alone", **model) == 0
    assert await house.metric("collm_deferral_run_length_count", **model) == 0


async def test_policies_are_told_apart(house: House) -> None:
    rate = "collm_request_deferral_rate_count"
    assert await house.metric(rate, policy="threshold", **JOINT) == 0
    await house.complete(max_tokens=2)
    await house.complete(max_tokens=4, collaboration={"policy": "never"})
    await house.complete(max_tokens=4, collaboration={"policy": "random"})
    assert [await house.metric(rate, policy=name, **JOINT) for name in ("threshold", "never", "random")] == [1, 1, 1]
    assert await house.metric("collm_tokens_total", source="base", policy="never", **JOINT) == 2
    assert await house.metric("collm_tokens_total", source="base", policy="threshold", **JOINT) == 1


async def test_lengths_and_the_time_in_the_queue(build: Build) -> None:
    def script(request: GenerationRequest) -> list[Delta]:
        deltas = deltas_of(request, letters("abc"))
        deltas[-1].cost = Cost(0.75, 0, [0, 0], [0.0, 0.0])
        return deltas

    house = await build(script)
    await house.complete(n=2, max_tokens=3)
    prompt = len(house.engine.seen[0].prompt)
    assert await house.metric("collm_request_queue_seconds_sum", **JOINT) == 1.5
    assert await house.metric("collm_request_prompt_tokens_sum", **JOINT) == 2 * prompt
    assert await house.metric("collm_request_generation_tokens_sum", **JOINT) == 6
    assert await house.metric("collm_request_generation_tokens_count", **JOINT) == 2


async def test_limits_stand_beside_their_gauges(build: Build) -> None:
    house = await build(scheduler={"max_num_seqs": 7}, server={"max_queued_requests": 9})
    assert await house.metric("collm_max_requests_running", **JOINT) == 7
    assert await house.metric("collm_max_requests_waiting", **JOINT) == 9
    assert await house.metric("collm_lane_kv_cache_tokens", lane="codes", **JOINT) == 64 * 16


async def test_processes(house: House) -> None:
    """The stand-in of an engine is in this very process; one that is gone has no memory."""
    engine = "collm_engine_process_resident_memory_bytes"
    assert await house.metric(engine) > 1 << 20
    assert await house.metric("process_resident_memory_bytes") > 1 << 20
    house.service.lose()
    await house.http.get("/metrics")
    assert house.service.metrics.registry.get_sample_value(engine) is None


async def test_names_that_endpoint_pickers_read(build: Build) -> None:
    plain = await build()
    assert "vllm:" not in (await plain.http.get("/metrics")).text
    house = await build(waits_forever, server={"vllm_metric_names": True})
    request = asyncio.create_task(house.complete(n=3))
    await until(lambda: len(house.engine.seen) == 3)
    house.engine.batch(EngineStats([LaneStats("base", kv_usage=0.25), LaneStats("codes", kv_usage=0.75)], running=2))
    assert await house.metric("vllm:num_requests_running", **JOINT) == 2
    assert await house.metric("vllm:num_requests_waiting", **JOINT) == 1
    assert await house.metric("vllm:kv_cache_usage_perc", **JOINT) == 0.75
    text = (await house.http.get("/metrics")).text
    assert 'vllm:kv_cache_usage_perc{model_name="collm-demo"} 0.75' in text.splitlines()
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)


async def test_the_engine_s_account(house: House) -> None:
    lane = {"lane": "codes", **JOINT}
    stats = EngineStats(
        [LaneStats("base"), LaneStats("codes", 3, [0.01, 0.02], 5, 100, 7, 2, 3, 0.5)],
        expert_waits=[0.1, 0.2],
        unaligned_deferrals=4,
        vetoed=6,
        regretted=2,
        revoked=7,
    )
    stats.lanes[1].device_seconds = 0.02
    house.engine.batch(stats)
    stats.lanes[1].device_seconds = 0.045
    stats.lanes[1].prompt_tokens, stats.lanes[1].cache_queries, stats.lanes[1].cache_hits = 40, 60, 20
    stats.loop_seconds, stats.step_seconds = 2.5, 2.0
    stats.lanes[1].catchup_tokens, stats.lanes[1].preemptions, stats.lanes[1].step_seconds = 9, 2, [0.03]
    stats.expert_waits = []
    house.engine.batch(stats)
    assert await house.metric("collm_lane_step_seconds_count", **lane) == 3
    assert await house.metric("collm_lane_step_seconds_sum", **lane) == pytest.approx(0.06)
    assert await house.metric("collm_lane_device_seconds_total", **lane) == pytest.approx(0.045)
    assert await house.metric("collm_lane_batch_rows", **lane) == 5
    assert await house.metric("collm_lane_kv_cache_usage_ratio", **lane) == 0.5
    assert await house.metric("collm_lane_catchup_tokens_total", **lane) == 9
    assert await house.metric("collm_lane_preemptions_total", **lane) == 2
    assert await house.metric("collm_lane_computed_tokens_total", **lane) == 100
    assert await house.metric("collm_lane_prompt_tokens_total", **lane) == 40
    assert await house.metric("collm_lane_prefix_cache_queries_total", **lane) == 60
    assert await house.metric("collm_lane_prefix_cache_hits_total", **lane) == 20
    assert await house.metric("collm_engine_active_seconds_total", **JOINT) == 2.5
    assert await house.metric("collm_engine_lane_seconds_total", **JOINT) == 2.0
    assert await house.metric("collm_expert_wait_seconds_count", **JOINT) == 2
    assert await house.metric("collm_unaligned_deferrals_total", **JOINT) == 4
    assert await house.metric("collm_vetoed_tokens_total", **JOINT) == 6
    assert await house.metric("collm_regretted_tokens_total", **JOINT) == 2
    assert await house.metric("collm_revoked_tokens_total", **JOINT) == 7
    assert await house.metric("collm_lane_up", **lane) == 1


async def test_counters_survive_a_restart_of_the_engine(house: House) -> None:
    lane = {"lane": "codes", **JOINT}
    house.engine.batch(EngineStats([LaneStats("base"), LaneStats("codes", catchup_tokens=9, rows=4)]))
    house.service.lose()
    assert await house.metric("collm_lane_batch_rows", **lane) == 0
    assert await house.metric("collm_lane_up", **lane) == 0
    house.service.reload()
    house.service.attach(house.engine)
    house.engine.callbacks[-1]([], EngineStats([LaneStats("base"), LaneStats("codes", catchup_tokens=2)]))
    assert await house.metric("collm_lane_catchup_tokens_total", **lane) == 11
    assert await house.metric("collm_lane_up", **lane) == 1


async def test_run_ahead_is_counted_across_a_restart(house: House) -> None:
    lanes = [LaneStats("base"), LaneStats("codes")]
    for accepted, discarded in ((2, 1), (5, 1)):
        house.engine.batch(EngineStats(lanes, runahead_accepted=accepted, runahead_discarded=discarded))
    house.service.lose()
    house.service.reload()
    house.service.attach(house.engine)
    house.engine.callbacks[-1]([], EngineStats(lanes, runahead_accepted=4, runahead_discarded=3))
    assert await house.metric("collm_runahead_tokens_total", result="accepted", **JOINT) == 9
    assert await house.metric("collm_runahead_tokens_total", result="discarded", **JOINT) == 4


async def test_load_gauges_return_to_zero(build: Build) -> None:
    house = await build(waits_forever)
    requests = [asyncio.create_task(house.complete()) for _ in range(3)]
    while len(house.engine.seen) < 3:
        await asyncio.sleep(0)
    house.engine.batch(EngineStats([LaneStats("base"), LaneStats("codes")], running=2, waiting=1))
    assert await house.metric("collm_requests_running", **JOINT) == 2
    assert await house.metric("collm_requests_waiting", **JOINT) == 1
    for request in requests:
        request.cancel()
    await asyncio.gather(*requests, return_exceptions=True)
    # The engine has said nothing new: what it said last is no longer true.
    assert await house.metric("collm_requests_running", **JOINT) == 0
    assert await house.metric("collm_requests_waiting", **JOINT) == 0
    assert await house.metric("collm_requests_total", outcome="aborted", **JOINT) == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_choices_that_have_ended_do_not_wait(build: Build, stream: bool) -> None:
    """They hold their places until the whole response is complete."""

    def script(request: GenerationRequest) -> Iterable[Delta] | AsyncIterator[Delta]:
        if request.request_id.endswith("-3"):
            return waits_forever(request)
        return deltas_of(request, letters("ab"))

    house = await build(script)
    request = asyncio.create_task(house.complete(n=5, stream=stream))
    await until(lambda: house.service.admission.unfinished == 1)
    house.engine.batch(EngineStats([LaneStats("base"), LaneStats("codes")], running=1))
    assert await house.metric("collm_requests_running", **JOINT) == 1
    assert await house.metric("collm_requests_waiting", **JOINT) == 0
    assert house.service.admission.in_flight == 5
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    assert (house.service.admission.in_flight, house.service.admission.unfinished) == (0, 0)
    assert await house.metric("collm_requests_running", **JOINT) == 0


async def test_http_labels_are_bounded(house: House) -> None:
    for path in ("/a", "/b/c", "/v1/models/collm-demo/base", "/v1/models/nope"):
        await house.http.get(path)
    await house.http.request("BREW", "/health")
    await house.complete(prompt="")
    count = "collm_http_requests_total"
    assert await house.metric(count, route="other", method="GET", status="404") == 2
    assert await house.metric(count, route="/v1/models/{id}", method="GET", status="200") == 1
    assert await house.metric(count, route="/v1/models/{id}", method="GET", status="404") == 1
    assert await house.metric(count, route="/health", method="other", status="405") == 1
    assert await house.metric(count, route="/v1/completions", method="POST", status="400") == 1


async def test_build_info(build: Build) -> None:
    house = await build()
    assert await house.metric("collm_build_info", version=__version__, gate="gate-folder", threshold="0.5") == 1
    plain = await build(gate=False)
    assert await plain.metric("collm_build_info", version=__version__, gate="none", threshold="") == 1
