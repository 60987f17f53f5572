"""Builders with defaults, so that a test is a few lines."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

from bench.standin import StandinLane
from engine.blends import Blend
from engine.config import EngineConfig, ExpertConfig, LaneConfig
from engine.lanes import Lane, LaneRequest, LaneWork, Sample
from engine.lanes.shelf import Shelf
from engine.scheduler import Scheduler
from engine.strategies import Strategies
from engine.types import Collaboration, Delta, GenerationRequest, SamplingSpec
from tests.engine.oracle import Ledger, Pair, Written

BASE_WRITES, EXPERT_WRITES = -2.0, 2.0
"""Values of the gate, for the default threshold."""

POLICY_NAMES = ("threshold", "sample", "always", "never", "random", "confidence")


def request(
    request_id: str = "a", prompt: Iterable[int] = (1, 2, 3), client: str = "", *, scores: bool = False, **fields: Any
) -> GenerationRequest:
    """A request; ``fields`` are those of SamplingSpec and Collaboration. Four tokens and no EOS unless said."""
    sampling = {"max_tokens": 4, "ignore_eos": True, "seed": 1}
    collaboration = {}
    for name, value in fields.items():
        (collaboration if name in Collaboration.__struct_fields__ else sampling)[name] = value
    return GenerationRequest(
        request_id, list(prompt), SamplingSpec(**sampling), Collaboration(**collaboration), client=client, scores=scores
    )


def mixed_requests(count: int, pair: Pair, seed: int = 0) -> list[GenerationRequest]:
    """Requests of every kind, the same for the same seed; a few cannot be served."""
    dice = random.Random(seed)

    def maybe(value: Any, chance: float = 0.3) -> Any:
        return value if dice.random() < chance else None

    def blend() -> Blend:
        members = sorted(dice.sample(range(pair.lanes), dice.randrange(1, pair.lanes + 1)))
        kind = dice.choice(("mixture", "product", "union"))
        weights = [dice.choice((0.0, 1.0, 2.0)) for _ in members]
        if kind != "product" and sum(weights):
            weights = [weight / sum(weights) for weight in weights]
        return Blend(kind, tuple(zip(members, weights, strict=True)))

    def one(number: int) -> GenerationRequest:
        length = dice.choice((1, 2, 3, dice.randrange(1, pair.max_model_len), pair.max_model_len - 1))
        if dice.random() < 0.02:
            length = pair.max_model_len
        return request(
            str(number),
            [dice.randrange(pair.vocab_size) for _ in range(length)],
            max_tokens=dice.randrange(1, 20),
            min_tokens=dice.choice((0, 0, 5, 30)),
            ignore_eos=dice.random() < 0.3,
            stop_token_ids=tuple(dice.sample(range(pair.vocab_size), dice.randrange(3))),
            seed=dice.randrange(1 << 63),
            logprobs=maybe(dice.randrange(4)),
            prompt_logprobs=maybe(1),
            member=maybe(dice.randrange(pair.lanes), 0.2),
            policy=maybe(dice.choice(POLICY_NAMES), 0.8),
            threshold=maybe(dice.random(), 0.5),
            rate=dice.random(),
            max_expert_tokens=maybe(dice.randrange(6)),
            experts=maybe(tuple(dice.sample(range(1, pair.lanes), dice.randrange(pair.lanes)))),
            run_ahead=dice.choice((None, "auto", "off", 1, 3, 9)),
            blend=maybe(blend()),
            veto=maybe(dice.choice((0.0, 0.4)), 0.2),
            looks=dice.random() < 0.3,
        )

    return [one(number) for number in range(count)]


OF_DEFERRAL = ("expert_failure", "run_ahead", "draft_pays", "shelf_has_room", "score_window", "drafting", "regret")


def make_scheduler(pair: Pair, kind: type[Scheduler] = Scheduler, **options: Any) -> Scheduler:
    """``options`` are the scheduler's own and those of deferral."""
    of_deferral = {name: options.pop(name) for name in OF_DEFERRAL if name in options}
    return kind(
        lanes=pair.lanes,
        max_num_seqs=pair.max_num_seqs,
        max_model_len=pair.max_model_len,
        eos_token_ids=pair.eos,
        strategy=Strategies(
            pair.lanes,
            has_gate=pair.has_gate,
            policy=pair.policy,
            threshold=pair.threshold,
            hindsight=pair.hindsight,
            **of_deferral,
        ),
        **options,
    )


def make_lanes(
    pair: Pair, kind: Callable[..., StandinLane] = StandinLane, *, shelf: Shelf | None = None, **options: Any
) -> list[StandinLane]:
    """Base first. ``options`` are the stand-in's own."""
    shelf = shelf or Shelf()
    return [
        kind(
            number,
            f"lane-{number}",
            experts=pair.experts if number == 0 and pair.has_gate else 0,
            vocab_size=pair.vocab_size,
            max_model_len=pair.max_model_len,
            shelf=shelf,
            **options,
        )
        for number in range(pair.lanes)
    ]


class RepeatingLane(StandinLane):
    """Samples a dropped row a second time at the same position, as a real lane may, instead of leaving it alone.

    Once: two rows that repeat themselves whenever they are dropped can take each other's memory for ever.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._repeated: set[str] = set()

    def preempt(self, request_id: str) -> None:
        super().preempt(request_id)
        if request_id not in self._repeated:
            self._repeated.add(request_id)
            self._rows[request_id].preempted = False

    def apply(self, work: LaneWork) -> None:
        self._repeated.difference_update(work.remove, [extension.request_id for extension in work.extend])
        for extension in work.extend:
            row = self._rows[extension.request_id]
            if row.computed < len(row.tokens):
                row.computed = 0
        super().apply(work)


def sample(request_id: str = "a", position: int = 3, token: int = 5, gate: float = BASE_WRITES, **more: Any) -> Sample:
    """A sample by hand; ``gate`` is the one expert's value."""
    return Sample(request_id, position, token, [gate], **more)


class Rig:
    """A scheduler with its lanes, stepped by hand. ``options`` that are not the pair's are the scheduler's."""

    def __init__(self, lanes: dict[str, Any] | None = None, **options: Any) -> None:
        of_pair = {name: options.pop(name) for name in list(options) if name in Pair.__dataclass_fields__}
        self.pair = Pair(**of_pair)
        self.scheduler = make_scheduler(self.pair, **options)
        self.lanes: list[Any] = make_lanes(self.pair, **(lanes or {}))
        self.ledger = Ledger()

    def add(self, *requests: GenerationRequest) -> None:
        for item in requests:
            self.scheduler.add(item)

    def step(self, lane: int) -> list[Sample]:
        """Plan, apply, step and land one lane; returns what it sampled."""
        driven: Lane = self.lanes[lane]
        driven.apply(self.scheduler.plan(lane))
        samples = driven.start().result().samples if driven.has_work() else []
        self.scheduler.land(lane, samples)
        return samples

    def deltas(self) -> list[Delta]:
        deltas = self.scheduler.take_deltas()
        self.ledger.take(deltas)
        return deltas

    def run(self, passes: int = 2000) -> dict[str, Written]:
        """Step all lanes in turn until nothing is left; returns what all requests got."""
        for _ in range(passes):
            self.deltas()
            if self.scheduler.idle:
                return self.ledger.got
            for lane in range(len(self.lanes)):
                self.step(lane)
        raise AssertionError("the scheduler does not come to rest")

    def told(self, lane: int) -> list[LaneRequest]:
        """What the lane would be told next, and is told: its new requests."""
        work = self.scheduler.plan(lane)
        self.lanes[lane].apply(work)
        return work.add


def standin_config(
    pair: Pair, coordination: str = "lockstep", step_timeout_seconds: float = 60.0, **options: Any
) -> EngineConfig:
    """Stand-in lanes for an engine process; ``options`` are the stand-in's own."""
    standin = {"vocab_size": pair.vocab_size, "max_model_len": pair.max_model_len, **options}
    return EngineConfig(
        base=LaneConfig(model="base", backend="bench.standin", vllm=standin),
        experts=tuple(
            ExpertConfig(name=f"expert-{number}", model="expert", backend="bench.standin", vllm=standin)
            for number in range(1, pair.lanes)
        ),
        gate={"policy": pair.policy, "threshold": pair.threshold},
        scheduler={
            "coordination": coordination,
            "max_num_seqs": pair.max_num_seqs,
            "step_timeout_seconds": step_timeout_seconds,
        },
    )
