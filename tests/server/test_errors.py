from __future__ import annotations

import asyncio

import pytest

from tests.server.conftest import Build, House
from tests.server.fakes import check_error, waits_forever
from tests.waiting import until


@pytest.mark.parametrize("path", ["/nope", "/v1", "/v1/completion", "/v1/completions/", "/v1//models"])
async def test_unknown_paths(house: House, path: str) -> None:
    for method in ("GET", "POST"):
        check_error(await house.http.request(method, path), 404)


async def test_an_unknown_file_of_the_playground(house: House) -> None:
    check_error(await house.http.get("/static/x"), 404)
    check_error(await house.http.post("/static/x"), 405)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/completions", "POST"),
        ("DELETE", "/v1/chat/completions", "POST"),
        ("POST", "/v1/models", "GET"),
        ("PUT", "/health", "GET"),
        ("OPTIONS", "/v1/completions", "POST"),
        ("BREW", "/v1/completions", "POST"),
    ],
)
async def test_wrong_methods(house: House, method: str, path: str, allowed: str) -> None:
    response = await house.http.request(method, path)
    check_error(response, 405)
    assert response.headers["allow"] == allowed


@pytest.mark.parametrize("model", ["gpt-4", "collm-demo/", "collm-demo/nobody", "base", "", "collm-demo/base/x"])
async def test_unknown_models(house: House, model: str) -> None:
    error = check_error(await house.complete(model=model), 404, "model")
    assert error["code"] == "model_not_found"
    check_error(await house.chat(model=model), 404, "model")


async def test_while_loading_requests_are_told_to_come_back(build: Build) -> None:
    house = await build(attach=False)
    for response in (await house.complete(), await house.chat(), await house.http.get("/ready")):
        error = check_error(response, 503)
        assert error["code"] == "not_ready"
        assert int(response.headers["retry-after"]) >= 1
    assert (await house.http.get("/health")).status_code == 200
    assert (await house.http.get("/v1/models")).status_code == 200
    assert (await house.http.get("/metrics")).status_code == 200
    assert (await house.http.get("/version")).json()["engine"] == {}
    house.service.attach(house.engine)
    assert (await house.complete()).status_code == 200
    assert (await house.http.get("/ready")).json() == {"status": "ready"}


async def test_while_draining_requests_in_flight_finish_and_late_ones_do_not_start(build: Build) -> None:
    house = await build()
    begun, go = asyncio.Event(), asyncio.Event()
    script = house.engine.script

    async def slow(request):  # type: ignore[no-untyped-def]
        begun.set()
        await go.wait()
        for delta in script(request):  # type: ignore[union-attr]
            yield delta

    house.engine.script = slow
    running = asyncio.create_task(house.complete(max_tokens=3))
    await begun.wait()
    house.service.drain()
    check_error(await house.complete(), 503)
    check_error(await house.http.get("/ready"), 503)
    assert (await house.http.get("/health")).status_code == 200
    drained = asyncio.create_task(house.service.admission.drained())
    await asyncio.sleep(0)
    assert not drained.done()
    go.set()
    assert (await running).json()["choices"][0]["text"] == "abc"
    await asyncio.wait_for(drained, 30)


async def test_a_dead_engine_is_neither_healthy_nor_ready(house: House) -> None:
    house.engine.die()
    for path in ("/health", "/ready"):
        check_error(await house.http.get(path), 503)
    check_error(await house.complete(), 503)
    house.service.lose()
    for path in ("/health", "/ready"):
        check_error(await house.http.get(path), 503)
    assert await house.metric("collm_lane_up", model_name="collm-demo", lane="base") == 0


async def test_an_engine_that_dies_under_a_request(build: Build) -> None:
    house = await build()
    script = house.engine.script

    def dying(request):  # type: ignore[no-untyped-def]
        deltas = script(request)
        house.engine.die()
        return deltas

    house.engine.script = dying
    error = check_error(await house.complete(), 500)
    assert error["code"] == "engine_dead"


@pytest.mark.parametrize("stream", [False, True])
async def test_the_queue_limit_holds(build: Build, stream: bool) -> None:
    house = await build(waits_forever, scheduler={"max_num_seqs": 4}, server={"max_queued_requests": 8})
    requests = [asyncio.create_task(house.complete(stream=stream)) for _ in range(60)]
    done: set[asyncio.Task] = set()
    while len(done) < 48:
        finished, _ = await asyncio.wait(requests, return_when=asyncio.FIRST_COMPLETED)
        done |= finished
        requests = [request for request in requests if request not in done]
    # Rejections are answered before the admitted ones have been through tokenisation.
    await until(lambda: len(house.engine.seen) >= 12)
    assert len(house.engine.seen) == 12
    for request in done:
        response = request.result()
        error = check_error(response, 429)
        assert error["code"] == "overloaded"
        assert int(response.headers["retry-after"]) >= 1
    assert await house.metric("collm_requests_total", model_name="collm-demo", outcome="rejected") == 48
    assert await house.metric("collm_requests_waiting", model_name="collm-demo") == 12
    for request in requests:
        request.cancel()
    await asyncio.gather(*requests, return_exceptions=True)
    assert len(house.engine.closed_early) == 12
    assert await house.metric("collm_requests_waiting", model_name="collm-demo") == 0


async def test_an_unexpected_error_is_an_error_object_too(house: House, caplog: pytest.LogCaptureFixture) -> None:
    house.service.models.member = None  # type: ignore[method-assign, assignment]
    error = check_error(await house.complete(), 500)
    assert error == {"message": "Internal error.", "type": "server_error", "param": None, "code": "internal_error"}
    assert "Traceback" in caplog.text


async def test_request_ids(house: House) -> None:
    given = await house.http.get("/health", headers={"X-Request-Id": "my-id.7"})
    assert given.headers["x-request-id"] == "my-id.7"
    made = {(await house.http.get("/nope")).headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    bad = await house.http.get("/health", headers={"X-Request-Id": "x" * 200})
    assert bad.headers["x-request-id"] != "x" * 200


async def test_the_reference_s_examples_ask_the_pair_s_own_question(build: Build) -> None:
    house = await build(example_prompt="What is the code of asthma?")
    paths = (await house.http.get("/openapi.json")).json()["paths"]
    examples = [
        paths[f"/v1/{route}"]["post"]["requestBody"]["content"]["application/json"]["example"]
        for route in ("completions", "chat/completions")
    ]
    assert examples[1]["messages"] == [{"role": "user", "content": "What is the code of asthma?"}]
    assert house.service.chat_template is not None
    assert examples[0]["prompt"] == house.service.chat_template.render(examples[1]["messages"])
    assert all(example["collaboration"] == {"report": True} for example in examples)


async def test_the_openapi_document(house: House) -> None:
    document = (await house.http.get("/openapi.json")).json()
    assert (await house.http.get("/docs")).status_code == 200
    schemas = document["components"]["schemas"]
    completions = document["paths"]["/v1/completions"]["post"]
    assert set(completions["responses"]) >= {"200", "400", "401", "404", "413", "429", "500", "503", "504"}
    assert schemas["ErrorBody"]["required"] == ["message", "type", "param", "code"]
    assert schemas["CollaborationOptions"]["properties"]["threshold"]["description"]

    def references(node: object) -> set[str]:
        if isinstance(node, dict):
            own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
            return own.union(*map(references, node.values()))
        return set().union(*map(references, node)) if isinstance(node, list) else set()

    missing = {ref for ref in references(document) if ref.removeprefix("#/components/schemas/") not in schemas}
    assert not missing
    assert set(document["paths"]) == {
        "/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{id}", "/tokenize", "/detokenize",
        "/health", "/ready", "/version", "/metrics",
    }  # fmt: skip
