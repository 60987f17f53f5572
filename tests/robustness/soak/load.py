"""The load: what is sent, and what must come back."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from tests.robustness.servers import MODEL, PROMPTS, FaultServer
from tests.robustness.soak.record import Record

POLICIES: list[dict[str, Any]] = [
    {},
    {"collaboration": {"policy": "sample"}},
    {"collaboration": {"policy": "always"}},
    {"collaboration": {"policy": "never"}},
    {"collaboration": {"policy": "random", "rate": 0.5}},
    {"collaboration": {"policy": "confidence", "threshold": 0.4}},
    {"collaboration": {"max_expert_tokens": 2, "report": True}},
    {"model": f"{MODEL}/base"},
    {"model": f"{MODEL}/codes"},
]
INVALID: list[dict[str, Any]] = [
    {"temperature": -1},
    {"prompt": []},
    {"model": "nobody"},
    {"max_tokens": 10**9},
    {"collaboration": {"policy": "magic"}},
    {"logprobs": 99, "stream": True},
]
KEYS = [f"soak-key-{number}" for number in range(4)]
Answer = tuple[Any, ...]


class Load:
    """Clients that send requests of every kind, each one after the other's end.

    Args:
        clients: how many at the same time.
        seed: of what is sent, and in which order.
    """

    def __init__(self, server: FaultServer, record: Record, clients: int, seed: int) -> None:
        self._server = server
        self._record = record
        self._clients = clients
        self._dice = random.Random(seed)
        self._numbers = itertools.count()
        self._oracle: dict[str, Answer] = {}
        self._http: httpx.AsyncClient
        # (weight, what)
        self._kinds: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (30, self._known),
            (20, self._seeded),
            (12, self._gone_from_stream),
            (6, self._gone_from_whole),
            (10, self._invalid),
            (6, self._long),
            (8, self._several),
            (8, self._chat),
        ]

    async def record_oracle(self) -> None:
        """Greedy answers of every policy, alone, before there is any load."""
        async with self._client() as self._http:
            for prompt, options in itertools.product(PROMPTS[:12], POLICIES):
                body = {**self._greedy(prompt), **options}
                self._oracle[json.dumps(body)] = await self._whole(body)

    async def run(self, seconds: float, pause_every: float, at_rest: Callable[[], Awaitable[None]]) -> None:
        """Load until the time is over, with a pause now and then in which ``at_rest`` is called."""
        begin = time.monotonic()
        while (passed := time.monotonic() - begin) < seconds:
            until = time.monotonic() + min(pause_every, seconds - passed)
            # Connections are closed before a pause, so that descriptors can be compared.
            async with self._client() as self._http, asyncio.TaskGroup() as group:
                for _ in range(self._clients):
                    group.create_task(self._one_client(until))
            await at_rest()

    def _client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self._clients)
        return httpx.AsyncClient(
            base_url=self._server.url,
            timeout=300,
            trust_env=False,
            limits=limits,
            event_hooks={"request": [self._sign]},
        )

    async def _sign(self, request: httpx.Request) -> None:
        """With any of the keys: for the server these are several clients."""
        request.headers["Authorization"] = f"Bearer {self._dice.choice(KEYS)}"

    async def _one_client(self, until: float) -> None:
        weights, kinds = zip(*self._kinds, strict=True)
        while time.monotonic() < until:
            (kind,) = self._dice.choices(kinds, weights)
            self._record.sent += 1
            begin = time.monotonic()
            try:
                await kind()
            except httpx.TransportError as error:
                self._record.fail(f"lost: {kind.__name__}: {type(error).__name__}")
            except AssertionError as error:
                self._record.fail(f"wrong: {kind.__name__}: {error}")
            self._record.ended(kind.__name__.strip("_"), begin)

    # -- kinds ------------------------------------------------------------------------------------------------

    @staticmethod
    def _greedy(prompt: str) -> dict[str, Any]:
        # The seed is for the policies that draw who writes.
        return {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 40, "seed": 1}

    async def _known(self) -> None:
        """A request whose answer was recorded at the start, whole or streamed."""
        key = self._dice.choice(list(self._oracle)[: 12 * len(POLICIES)])
        self._check(key, await self._either(json.loads(key)))

    async def _seeded(self) -> None:
        """A request that draws; its earlier answer, if there is one, must come again."""
        options = self._dice.choice(POLICIES)
        prompt = self._dice.choice(PROMPTS[:12])
        seed = self._dice.randrange(40)
        body = {**self._greedy(prompt), "temperature": 1.0, "top_p": 0.95, "seed": seed, "ignore_eos": True, **options}
        self._check(json.dumps(body), await self._either(body))

    async def _long(self) -> None:
        """Hundreds of tokens after a long prompt."""
        options = self._dice.choice(POLICIES)
        length = self._dice.randrange(100, 500)
        start = self._dice.randrange(400)
        body = {
            **self._greedy(""), "prompt": [2 + (start + index) % 1000 for index in range(length)],
            "max_tokens": 400, "ignore_eos": True, **options,
        }  # fmt: skip
        answer = await self._either(body)
        assert answer[0][1] == "length"

    async def _several(self) -> None:
        """Several prompts, several choices."""
        prompts = self._dice.sample(PROMPTS, 3)
        body = {**self._greedy(""), "prompt": prompts, "n": 2, "temperature": 0.8, "logprobs": 2}
        assert len(await self._either(body)) == 6

    async def _chat(self) -> None:
        messages = [{"role": "user", "content": self._dice.choice(PROMPTS)}]
        body = {"model": MODEL, "messages": messages, "max_tokens": 30, "temperature": 0}
        response = await self._post("/v1/chat/completions", body)
        assert response.status_code == 200, response.text[:200]
        assert response.json()["choices"][0]["finish_reason"] in ("stop", "length")
        self._record.completed += 1

    async def _invalid(self) -> None:
        body = {**self._greedy("Hello"), **self._dice.choice(INVALID)}
        response = await self._post("/v1/completions", body)
        assert response.status_code in (400, 404), response.status_code
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    async def _gone_from_stream(self) -> None:
        """The client reads some events and goes."""
        body = {**self._greedy(self._dice.choice(PROMPTS)), "max_tokens": 300, "ignore_eos": True, "stream": True}
        body |= self._dice.choice(POLICIES)
        self._record.abandoned += 1
        left = self._dice.randrange(30)
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, response.status_code
            async for _ in response.aiter_lines():
                left -= 1
                if left < 0:
                    break

    async def _gone_from_whole(self) -> None:
        """The client waits for a while and goes."""
        body = {**self._greedy(self._dice.choice(PROMPTS)), "max_tokens": 300, "ignore_eos": True}
        self._record.abandoned += 1
        task = asyncio.create_task(self._http.post("/v1/completions", json=body))
        await asyncio.wait({task}, timeout=self._dice.random() * 0.3)
        if not task.cancel():
            assert task.result().status_code == 200
        await asyncio.gather(task, return_exceptions=True)

    # -- answers ----------------------------------------------------------------------------------------------

    def _check(self, key: str, answer: Answer) -> None:
        expected = self._oracle.setdefault(key, answer)
        if expected is not answer:
            self._record.checked += 1
            assert answer == expected, f"another answer than before to {key[:200]}"

    async def _either(self, body: dict[str, Any]) -> Answer:
        return await (self._stream(body) if self._dice.random() < 0.5 else self._whole(body))

    async def _post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        name = f"soak-{next(self._numbers)}"
        response = await self._http.post(path, json=body, headers={"X-Request-Id": name})
        assert response.headers["x-request-id"] == name
        return response

    async def _whole(self, body: dict[str, Any]) -> Answer:
        """(text, finish_reason) of every choice."""
        response = await self._post("/v1/completions", body)
        assert response.status_code == 200, response.text[:200]
        content = response.json()
        self._once(content["id"])
        self._count(content["usage"], content["choices"])
        return tuple((choice["text"], choice["finish_reason"]) for choice in content["choices"])

    async def _stream(self, body: dict[str, Any]) -> Answer:
        """The same, streamed: each choice must end once, and the stream with [DONE] after its usage."""
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        texts: dict[int, str] = {}
        reasons: dict[int, str] = {}
        usage: dict[str, Any] | None = None
        event: dict[str, Any] = {}
        done = False
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, response.status_code
            async for line in response.aiter_lines():
                if not line:
                    continue
                assert not done, "something came after [DONE]"
                if line == "data: [DONE]":
                    done = True
                    self._once(event["id"])
                    continue
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                assert usage is None, "something came after the usage"
                usage = event["usage"] if not event["choices"] else None
                for choice in event["choices"]:
                    index = choice["index"]
                    assert index not in reasons, "a choice went on after its end"
                    texts[index] = texts.get(index, "") + choice["text"]
                    if choice["finish_reason"] is not None:
                        reasons[index] = choice["finish_reason"]
        assert done, "a stream ended without [DONE]"
        assert usage is not None
        assert texts.keys() == reasons.keys()
        self._count(usage, list(reasons))
        return tuple((texts[index], reasons[index]) for index in sorted(reasons))

    def _once(self, response_id: str) -> None:
        assert response_id not in self._record.response_ids, "two responses with one id"
        self._record.response_ids.add(response_id)

    def _count(self, usage: dict[str, Any], choices: list[Any]) -> None:
        details = usage["completion_tokens_details"]
        assert details["base_tokens"] + details["expert_tokens"] == usage["completion_tokens"]
        self._record.completed += len(choices)
        self._record.tokens += usage["completion_tokens"]
