"""A scripted engine, a small real tokenizer, and helpers that keep tests to a few lines."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import msgspec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engine.errors import EngineDeadError
from engine.stats import EngineStats, LaneStats
from engine.types import (
    Collaboration,
    Delta,
    EngineInfo,
    GateInfo,
    GenerationRequest,
    LaneInfo,
    PolicyName,
    TokenLogprobs,
)
from server.settings import Settings

MODEL = "collm-demo"
EOS = "<|end|>"
CORPUS = [
    "The quick brown fox jumps over the lazy dog. Hello world, hello there!",
    "def main():\n    return 0\n",
    "été naïve 日本語 — emoji 😀 and more",
]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'developer' %}{{ raise_exception('no developer here') }}{% endif %}"
    "<|user|>{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def byte_level_tokenizer() -> Tokenizer:
    """A byte-level BPE; every byte is a token, so every text is representable."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[EOS, "<|user|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 10, trainer)
    return tokenizer


A = 66
"""Token id of the letter a; b and so on follow."""


def letters(text: str) -> list[int]:
    """Token ids of lower case letters, one per letter."""
    return [A + ord(letter) - ord("a") for letter in text]


def settings(**parts: Any) -> Settings:
    """Settings of a pair of stand-ins."""
    lane = {"backend": "bench.standin", "vllm": {"vocab_size": 512, "max_model_len": 256}}
    given: dict[str, Any] = {
        "served_model_name": MODEL,
        "base": {"model": "base", **lane},
        "experts": [{"name": "codes", "model": "expert", **lane}],
        **parts,
    }
    return Settings.model_validate(given)


Script = Callable[[GenerationRequest], Iterable[Delta] | AsyncIterator[Delta]]


class FakeEngine:
    """Has the shape of ``engine.client.EngineClient``; what it answers is a function of the request.

    Attributes:
        seen: requests in the order in which they came.
        closed_early: ids of requests that were closed before their last delta.
    """

    def __init__(
        self,
        script: Script,
        *,
        gate: bool = True,
        policy: PolicyName | None = None,
        max_model_len: int = 256,
        lane_names: Iterable[str] = ("base", "codes"),
        curve: Iterable[tuple[float, float]] = (),
        costs: Iterable[tuple[float, float]] = (),
    ) -> None:
        lanes = [LaneInfo(name, name, max_model_len, 64, 16) for name in lane_names]
        self.info = EngineInfo(
            lanes=lanes,
            vocab_size=512,
            max_model_len=max_model_len,
            eos_token_ids=[0],
            coordination="lockstep",
            gate=GateInfo("gate-folder", "threshold", 0.5, list(curve), list(costs)) if gate else None,
            versions={"vllm": "0.0"},
            policy="threshold" if gate else policy or "confidence",
            thresholds={"threshold": 0.5, "confidence": 0.5} if gate else {"confidence": 0.5},
        )
        self.stats = EngineStats([LaneStats(lane.name) for lane in lanes])
        self.pid = os.getpid()
        self.alive = True
        self.script = script
        self.seen: list[GenerationRequest] = []
        self.closed_early: list[str] = []
        self.callbacks: list[Callable[[list[Delta], EngineStats], None]] = []
        self._dead = asyncio.Event()
        self.shut_down = False

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        self.seen.append(request)
        finished = False
        try:
            deltas = self.script(request)
            if isinstance(deltas, AsyncIterator):
                async for delta in deltas:
                    finished = delta.finish_reason is not None
                    yield delta
            else:
                for number, delta in enumerate(deltas):
                    if not self.alive:
                        raise EngineDeadError("killed")
                    finished = delta.finish_reason is not None
                    if number == 0:
                        delta.collaboration = self._in_force(request)
                    yield delta
                    await asyncio.sleep(0)
        finally:
            if not finished:
                self.closed_early.append(request.request_id)

    def _in_force(self, request: GenerationRequest) -> Collaboration:
        asked = request.collaboration
        policy = asked.policy or self.info.policy
        threshold = None
        if policy == "threshold" and self.info.gate is not None:
            threshold = self.info.gate.threshold if asked.threshold is None else asked.threshold
        return msgspec.structs.replace(asked, policy=policy, threshold=threshold)

    def on_batch(self, callback: Callable[[list[Delta], EngineStats], None]) -> None:
        self.callbacks.append(callback)

    def batch(self, stats: EngineStats) -> None:
        self.stats = stats
        for callback in self.callbacks:
            callback([], stats)

    def die(self) -> None:
        self.alive = False
        self._dead.set()

    async def wait_dead(self) -> str:
        await self._dead.wait()
        return "killed"

    async def shutdown(self) -> None:
        self.die()
        self.shut_down = True


def entry(token: int, count: int) -> TokenLogprobs:
    """A position's logprobs: the written token, then the ``count`` most probable ones, the written one among them."""
    top = [token, *(other for other in range(300, 320) if other != token)][:count]
    return TokenLogprobs([token, *top], [-0.25, *(-0.25 - rank for rank in range(len(top)))], 1)


def deltas_of(
    request: GenerationRequest,
    tokens: list[int],
    *,
    sources: list[int] | None = None,
    per_delta: int = 1,
    finish: str = "length",
    stop_token: int | None = None,
) -> list[Delta]:
    """Deltas that write these tokens; sources alternate unless they are given."""
    member = request.collaboration.member
    sources = sources or [index % 2 if member is None else member for index in range(len(tokens))]
    sampling = request.sampling
    deltas = []
    for start in range(0, len(tokens), per_delta):
        chunk = slice(start, start + per_delta)
        delta = Delta(request.request_id, tokens[chunk], sources[chunk])
        delta.deferrals = [None if member is not None else 0.25 + 0.5 * source for source in delta.sources]
        if sampling.logprobs is not None:
            delta.logprobs = [entry(token, sampling.logprobs) for token in delta.tokens]
        deltas.append(delta)
    if sampling.prompt_logprobs is not None:
        deltas[0].prompt_logprobs = [entry(token, sampling.prompt_logprobs) for token in request.prompt[1:]]
    deltas[-1].finish_reason = finish  # type: ignore[assignment]
    deltas[-1].stop_token = stop_token
    return deltas


def writes(tokens: list[int], **how: Any) -> Script:
    """A script that writes these tokens, cut to max_tokens, for every request."""

    def script(request: GenerationRequest) -> list[Delta]:
        return deltas_of(request, tokens[: request.sampling.max_tokens], **how)

    return script


async def waits_forever(request: GenerationRequest) -> AsyncIterator[Delta]:
    """A script: one token, then nothing more."""
    yield Delta(request.request_id, [100], [0], [0.1])
    await asyncio.Event().wait()


def events(body: str) -> list[Any]:
    """The payloads of a stream; its last event may be "[DONE]"."""
    found: list[Any] = []
    for block in body.split("\n\n"):
        if block:
            assert block.startswith("data: "), block
            data = block.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
    return found


def check_error(response: Any, status: int, param: str | None = None) -> dict[str, Any]:
    """The response is an error of the contract's shape; returns its inside."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert len(error["message"]) < 600
    assert isinstance(error["type"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    if param is not None:
        assert error["param"] == param, error
    assert response.headers["content-type"] == "application/json"
    return dict(error)
