"""A deterministic stand-in for a lane: no model, the same interface, and free to preempt and reorder like a real one.

Its "model" is a hash of the whole prefix, so that one wrong, missing or repeated token anywhere changes everything
after it. It computes prompts in chunks under a token budget, and drops rows when its KV memory is full, parked ones
included, like a real lane. For the cost model's virtual clock, and for tests of the scheduler and of servers:
``backend = "bench.standin"``, whose options are a lane's table ``vllm``. Sampling parameters are not looked at.
"""

from __future__ import annotations

import time
import zlib
from array import array
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.blends import Blend
from engine.config import EngineConfig
from engine.lanes.backend import Loaded
from engine.lanes.interface import Computed, Lane, LaneReport, LaneRequest, LaneWork, Refusal, Sample
from engine.lanes.shelf import Offer, Shelf
from engine.spelling.mass import Mass
from engine.spelling.vocabulary import Vocabulary
from engine.stats import LaneStats
from engine.types import NEGATIVE, GateInfo, GenerationRequest, LaneInfo, TokenLogprobs


def next_token(lane: int, tokens: Sequence[int], vocab_size: int) -> int:
    """The token that the stand-in of a lane writes after ``tokens`` (prompt included)."""
    return zlib.crc32(array("I", tokens).tobytes(), lane + 1) % vocab_size


def gate_values(tokens: Sequence[int], experts: int) -> list[float]:
    """The gate's value for each expert after ``tokens``, spread over about -4 to 4."""
    data = array("I", tokens).tobytes()
    return [(zlib.crc32(data, 1000 + expert) % 8001 - 4000) / 1000.0 for expert in range(experts)]


def top_probability(lane: int, tokens: Sequence[int]) -> float:
    """How sure a lane is of the token after ``tokens``."""
    return zlib.crc32(array("I", tokens).tobytes(), 99 + lane) % 1001 / 1000.0


def regret_value(tokens: Sequence[int]) -> float:
    """What the base says after ``tokens`` of experts' tokens among the last ones, spread over about -4 to 4."""
    return (zlib.crc32(array("I", tokens).tobytes(), 2000) % 8001 - 4000) / 1000.0


def distribution(lane: int, tokens: Sequence[int]) -> int:
    """What stands for a lane's distribution after ``tokens``: a number that tells it from any other."""
    return zlib.crc32(array("I", tokens).tobytes(), 5000 + lane)


def combination(blend: Blend, distributions: Iterable[int], gate: Sequence[float] | None) -> int:
    """What stands for a combination.

    Args:
        distributions: of the members that weigh something, in lane order.
        gate: the gate's values at the position, if they are the weights.
    """
    settings = repr((blend.kind, blend.weights, blend.plausibility, blend.anchor, list(gate or ())))
    return zlib.crc32(array("Q", distributions).tobytes(), zlib.crc32(settings.encode()))


def support(distribution: int, token: int) -> float:
    """The log-probability of a token with a member, or with a combination."""
    return -(distribution % 997 + token) / 100.0


def mass_of(lane: int, tokens: Sequence[int], vocabulary: Vocabulary) -> Mass:
    """The distribution over byte strings of the stand-in of a lane after ``tokens``: mostly lower-case letters."""
    data = array("I", tokens).tobytes()
    seed = zlib.crc32(data, 9000 + lane)
    scores = np.random.default_rng(seed).integers(1, 1000, len(vocabulary) + 1).astype(np.float64)
    scores[:-1] *= _favour_letters(vocabulary)
    probabilities = np.zeros(max(*vocabulary.order, *vocabulary.stops) + 1)
    probabilities[vocabulary.order] = scores[:-1]
    probabilities[list(vocabulary.stops)] = scores[-1] / max(len(vocabulary.stops), 1)
    return Mass(vocabulary, probabilities)


@lru_cache(maxsize=8)
def _favour_letters(vocabulary: Vocabulary) -> NDArray[np.float64]:
    letters = [(vocabulary.bytes_of(int(token)) or b"A").islower() for token in vocabulary.order]
    return np.where(letters, 1.0, 1e-4)


class _Row:
    __slots__ = ("asked", "computed", "preempted", "request", "tokens", "wants_prompt_logprobs")

    def __init__(self, request: LaneRequest) -> None:
        self.request = request
        self.asked = list(request.asked)
        self.tokens = [*request.prompt, *request.written]
        self.computed = 0
        self.preempted = False
        self.wants_prompt_logprobs = request.sampling.prompt_logprobs is not None


class StandinLane:
    """See the module's docstring.

    Args:
        number: the lane's number; different lanes write different tokens.
        experts: how many gate values each sample carries; 0 for a lane without a gate.
        vocab_size: tokens are in [0, vocab_size).
        max_model_len: context in tokens.
        token_budget: most tokens computed in one step.
        kv_tokens: tokens of KV memory; None is plenty.
        step_seconds: pause of each step, so that clients can be tested against a lane that takes time.
        shelf: shared by the lanes of an engine, for blends.
        vocabulary: for requests that are written by characters.
    """

    def __init__(
        self,
        number: int,
        name: str,
        *,
        experts: int = 0,
        vocab_size: int = 256,
        max_model_len: int = 1024,
        token_budget: int = 512,
        kv_tokens: int | None = None,
        step_seconds: float = 0.0,
        shelf: Shelf | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self._number = number
        self._vocabulary = vocabulary
        self._experts = experts
        self._vocab_size = vocab_size
        self._token_budget = token_budget
        self._kv_tokens = kv_tokens if kv_tokens is not None else 1 << 40
        self._step_seconds = step_seconds
        self._shelf = shelf or Shelf()
        self._rows: dict[str, _Row] = {}
        self._stats = LaneStats(name)
        self._seconds: list[float] = []
        self._info = LaneInfo(name, "standin", max_model_len, kv_blocks=self._kv_tokens, block_size=1)

    @property
    def info(self) -> LaneInfo:
        """Name, checkpoint and sizes."""
        return self._info

    @property
    def depth(self) -> int:
        """Its steps are computed in the caller's thread."""
        return 0

    def refusal(self, request: GenerationRequest) -> Refusal | None:
        """Only token ids outside the vocabulary are refused."""
        prompt = request.prompt_of(self._number)
        if not 0 <= min(prompt) <= max(prompt) < self._vocab_size:
            return Refusal(f"prompt has a token id outside [0, {self._vocab_size})")
        return None

    def form_setup(self) -> None:
        """It follows no forms."""
        return None

    def apply(self, work: LaneWork) -> None:
        """Take in what changed."""
        for request_id in work.remove:
            self._rows.pop(request_id, None)
            self._shelf.forget(self._number, request_id)
        for request in work.add:
            assert request.request_id not in self._rows, f"{request.request_id} was added twice"
            row = self._rows[request.request_id] = _Row(request)
            self._stats.cache_queries += len(row.tokens)  # in a prefix cache that never has any
        for extension in work.extend:
            row = self._rows[extension.request_id]
            self._shelf.settle(self._number, extension.request_id, extension.final)
            keep = len(row.request.prompt) + extension.keep
            assert keep <= len(row.tokens), "a row cannot keep what it was never told"
            assert extension.tokens, "an extension brings at least one token"
            assert extension.final <= extension.keep + len(extension.tokens), "what was not told cannot be final"
            del row.tokens[keep:]
            row.computed = min(row.computed, keep)
            row.tokens.extend(extension.tokens)
            row.asked = list(extension.asked)
            row.preempted = False

    def has_work(self) -> bool:
        """Whether any row has tokens left to compute."""
        return any(self._pending(row) for row in self._rows.values())

    def is_preparing(self) -> bool:
        """Never."""
        return False

    @property
    def starved(self) -> int | None:
        """Never: a step that lacks memory takes it at once."""
        return None

    def make_room(self) -> None:
        """Nothing; see above."""

    def start(self) -> Future[LaneReport]:
        """Compute one step; the returned future is done."""
        begin = time.perf_counter()
        if self._step_seconds:
            time.sleep(self._step_seconds)
        budget = self._token_budget
        samples: list[Sample] = []
        work: list[Computed] = []
        for row in list(self._rows.values()):
            chunk = min(self._pending(row), budget)
            if chunk == 0:
                continue
            if not self._make_room(row, chunk):
                break
            of_prompt = chunk if row.request.scores else max(0, min(chunk, len(row.request.prompt) - row.computed))
            budget -= chunk
            row.computed += chunk
            work.append(Computed(self._number, row.request.request_id, chunk, of_prompt))
            self._stats.catchup_tokens += 0 if of_prompt else chunk - 1
            while row.asked and row.asked[0] <= row.computed:
                samples.append(self._sample(row, row.asked.pop(0), asked=True))
            if row.computed == len(row.tokens):
                samples.append(self._sample(row, row.computed))
        tokens = sum(part.tokens for part in work)
        report = LaneReport(samples, time.perf_counter() - begin, tokens, len(work), computed=work)
        self._seconds.append(report.seconds)
        self._stats.steps += 1
        self._stats.rows = len(work)
        self._stats.computed_tokens += tokens
        self._stats.prompt_tokens += sum(part.prompt_tokens for part in work)
        future: Future[LaneReport] = Future()
        future.set_result(report)
        return future

    def preempt(self, request_id: str) -> None:
        """Drop a row's KV memory, parked or not, as a real lane may at any time. For tests."""
        row = self._rows[request_id]
        if row.computed:
            row.preempted = row.computed == len(row.tokens)
            row.computed = 0
            self._stats.preemptions += 1

    def flush(self) -> None:
        """Nothing is kept for removed requests."""
        self._stats.rows = 0

    def leftovers(self) -> list[str]:
        """Requests that are still held."""
        found = [f"request {request_id}" for request_id in self._rows]
        return found + [f"distributions of {request_id}" for request_id in self._shelf.held(self._number)]

    def stats(self) -> LaneStats:
        """Counters and gauges."""
        seconds, self._seconds = self._seconds, []
        used = sum(row.computed for row in self._rows.values())
        return msgspec.structs.replace(
            self._stats,
            step_seconds=seconds,
            requests=len(self._rows),
            kv_usage=used / self._kv_tokens,
        )

    def shutdown(self) -> None:
        """Forget everything."""
        self._rows.clear()

    def _pending(self, row: _Row) -> int:
        # A parked row that was dropped is left alone until it is extended: nobody waits for its sample.
        return 0 if row.preempted else len(row.tokens) - row.computed

    def _make_room(self, row: _Row, chunk: int) -> bool:
        """Drop rows, the latest first, until ``chunk`` tokens fit; False if only older rows are left to drop."""
        used = sum(other.computed for other in self._rows.values())
        for request_id, other in reversed(self._rows.items()):
            if used + chunk <= self._kv_tokens:
                break
            if other is row:
                return self._make_room_from_parked(row, chunk)
            used -= other.computed
            self.preempt(request_id)
        return used + chunk <= self._kv_tokens

    def _make_room_from_parked(self, row: _Row, chunk: int) -> bool:
        used = sum(other.computed for other in self._rows.values())
        for request_id, other in self._rows.items():
            if used + chunk <= self._kv_tokens:
                break
            if other is not row and other.computed == len(other.tokens):
                used -= other.computed
                self.preempt(request_id)
        return used + chunk <= self._kv_tokens

    def _sample(self, row: _Row, position: int, *, asked: bool = False) -> Sample:
        request = row.request
        sampling = request.sampling
        tokens = row.tokens[:position]
        gate = gate_values(tokens, self._experts) if self._experts else None
        given = row.tokens[position] if asked and request.scores else None
        token, of_members, logprobs = self._draw(request, tokens, gate, given)
        prompt_logprobs = None
        if row.wants_prompt_logprobs:
            row.wants_prompt_logprobs = False
            prompt_logprobs = [
                self._logprobs(prompt_token, sampling.prompt_logprobs or 0) for prompt_token in request.prompt[1:]
            ]
        return Sample(
            request.request_id,
            position,
            token,
            gate=gate,
            top_probability=(top_probability(self._number, tokens) if request.wants_top_probability else None),
            logprobs=logprobs if sampling.logprobs is not None else None,
            prompt_logprobs=prompt_logprobs,
            support=of_members,
            regret=regret_value(tokens) if self._experts else None,
        )

    def _draw(
        self, request: LaneRequest, tokens: Sequence[int], gate: list[float] | None, given: int | None
    ) -> tuple[int, list[float] | None, TokenLogprobs]:
        """The token after ``tokens``, its support if it is a blend's, and its log-probabilities.

        Args:
            given: is not drawn but scored; None for a token that is drawn.
        """
        count = request.sampling.logprobs or 0
        part = request.part
        own = distribution(self._number, tokens)
        token = self._write(tokens) if given is None else given
        logprobs = self._logprobs(token, count, None if given is None else support(own, token))
        if part is None:
            return token, None, logprobs
        index = len(tokens) - len(request.prompt)
        if part.blend is None:
            assert self._vocabulary is not None
            said = mass_of(self._number, tokens, self._vocabulary)
            self._shelf.put(self._number, request.request_id, index, Offer(said))
            return token, None, logprobs
        if not part.writes:
            self._shelf.put(self._number, request.request_id, index, Offer(own, gate))
            return token, None, logprobs
        blend = part.blend
        offers = [self._shelf.get(lane, request.request_id, index) for lane in blend.lanes[:-1]]
        found = [offer for offer in offers if offer is not None]
        if len(found) < len(offers):
            return -1, None, logprobs
        distributions = [*(offer.row for offer in found), own]
        combined = combination(blend, distributions, found[0].gate if blend.from_gate else None)
        token = combined % self._vocab_size if given is None else given
        logprobs = self._logprobs(token, count, None if given is None else support(combined, token))
        return token, [support(of, token) for of in distributions], logprobs

    def _write(self, tokens: Sequence[int]) -> int:
        """The token after ``tokens``; what a kind of stand-in differs in."""
        return next_token(self._number, tokens, self._vocab_size)

    def _logprobs(self, token: int, count: int, logprob: float | None = None) -> TokenLogprobs:
        others = [(token + step) % self._vocab_size for step in range(count)]
        own = -0.5 if logprob is None else logprob
        return TokenLogprobs([token, *others], [own, *(-0.5 - step for step in range(count))], 1)


def load(config: EngineConfig, *, shelf: Shelf, **_: Any) -> Loaded:
    """Lanes of stand-ins, with a gate where there are experts; see :class:`engine.lanes.backend.Backend`."""
    lanes: list[Lane] = [
        StandinLane(number, name, experts=len(config.experts) if number == 0 else 0, shelf=shelf, **lane.vllm)
        for number, (name, lane) in enumerate(zip(config.lane_names, config.lanes, strict=True))
    ]
    if config.scheduler.guidance:
        lanes.append(StandinLane(len(lanes), NEGATIVE, shelf=shelf, **config.base.vllm))
    gate = None
    if config.experts:
        threshold = 0.5 if config.gate.threshold is None else config.gate.threshold
        gate = GateInfo("standin", config.gate.policy or "threshold", threshold)
    return Loaded(lanes, config.base.vllm.get("vocab_size", 256), [0], gate)
