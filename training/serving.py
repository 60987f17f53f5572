"""Answering questions with the engine that serves: what is calibrated and evaluated is what users get."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
from tqdm import tqdm

from engine.adapters import is_adapter
from engine.blends import Blend
from engine.config import EngineConfig, ExpertConfig, GateConfig, LaneConfig, SchedulerConfig
from engine.errors import EngineDeadError, EngineStartupError
from engine.offline import Engine
from engine.types import BASE, Collaboration, Completion, GenerationRequest, PolicyName, SamplingSpec, StrategyName
from training.checkpoints import load_tokenizer
from training.data import Example, TokenExample, spread
from training.errors import TrainingError
from training.project import Project
from training.settings import EngineSettings, Split

SAMPLE_TEMPERATURE = 0.7


@dataclass(frozen=True)
class Questions:
    """What is asked, and how long an answer may become.

    Attributes:
        room: an answer may have so many tokens more than the gold completion.
        begun: tokens of each answer that stand already, and are part of its prompt; empty where none do.
        most: so many tokens are written at most.
    """

    examples: Sequence[Example]
    tokens: Sequence[TokenExample]
    room: int
    begun: Sequence[list[int]] = ()
    most: int | None = None

    def __len__(self) -> int:
        return len(self.examples)


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: without the end-of-sequence token.
        ended: whether there was one.
        sources: lane numbers, 0 the base; BLEND where several wrote together.
        complete: whether the gold completion is one, or only the start of one.
        regretted: how many experts' tokens were taken back for the base's own.
    """

    task: str
    text: str
    gold: str
    ended: bool
    sources: list[int]
    complete: bool = True
    regretted: int = 0

    @property
    def exact(self) -> bool:
        """The text is the gold completion, and it ended there; or, where that is only a start, it starts so."""
        return self.ended and self.text == self.gold if self.complete else self.text.startswith(self.gold)


@dataclass(frozen=True)
class Result:
    """All answers to a set of questions, and the seconds that they took together.

    Attributes:
        expert_seconds: the questions' part of the experts' steps.
        lane_seconds: of all lanes' steps.
    """

    answers: list[Answer]
    seconds: float
    expert_seconds: float = 0.0
    lane_seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Completion tokens."""
        return sum(len(answer.sources) for answer in self.answers)

    @property
    def expert_tokens(self) -> int:
        """Completion tokens that an expert wrote, or had a part in."""
        return sum(source != BASE for answer in self.answers for source in answer.sources)

    @property
    def deferral_rate(self) -> float:
        """Expert tokens / completion tokens."""
        return self.expert_tokens / max(1, self.tokens)

    @property
    def taken_back(self) -> float:
        """Experts' tokens taken back, per answer."""
        return sum(answer.regretted for answer in self.answers) / len(self.answers)

    @property
    def score(self) -> float:
        """Share of exact answers."""
        return sum(answer.exact for answer in self.answers) / len(self.answers)

    def rate_by_task(self) -> dict[str, float]:
        """Deferral rate of each task."""
        tasks: dict[str, list[Answer]] = {}
        for answer in self.answers:
            tasks.setdefault(answer.task, []).append(answer)
        return {task: Result(answers, self.seconds).deferral_rate for task, answers in sorted(tasks.items())}

    def summary(self) -> dict[str, Any]:
        """The columns of the evaluation's table."""
        return {
            "questions": len(self.answers),
            "exact_match": self.score,
            "by_task": by_task([(answer.task, answer.exact) for answer in self.answers]),
            "deferral_rate": self.deferral_rate,
            "rate_by_task": self.rate_by_task(),
            "expert_tokens": self.expert_tokens,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "expert_seconds": self.expert_seconds,
            "lane_seconds": self.lane_seconds,
            "tokens_per_second": self.tokens / self.seconds,
        }

    def to_json(self) -> dict[str, Any]:
        """For ``from_json``."""
        seconds = {name: getattr(self, name) for name in ("seconds", "expert_seconds", "lane_seconds")}
        return {**seconds, "answers": [asdict(answer) for answer in self.answers]}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Result:
        """What ``to_json`` gave."""
        seconds = (content["seconds"], content.get("expert_seconds", 0.0), content.get("lane_seconds", 0.0))
        return cls([Answer(**answer) for answer in content["answers"]], *seconds)


def by_task(answers: Iterable[tuple[str, bool]]) -> dict[str, float]:
    """Share of right answers for each task, of (task, right)."""
    tasks: dict[str, list[bool]] = {}
    for task, right in answers:
        tasks.setdefault(task, []).append(right)
    return {task: sum(found) / len(found) for task, found in sorted(tasks.items())}


def mean_logprob(completion: Completion) -> float:
    """Of the completion's tokens, which were asked for with their log-probabilities."""
    entries = completion.logprobs or []
    return sum(entry.logprobs[0] for entry in entries) / max(1, len(entries))


def asked_numbers(project: Project, split: Split, limit: int | None) -> list[int]:
    """Numbers of those of the split's examples that are asked, at most ``limit``."""
    return spread(range(len(project.data(split).examples)), limit)


def questions_of(project: Project, split: Split, limit: int | None) -> Questions:
    """The split's examples as questions, at most ``limit``."""
    data, numbers = project.data(split), asked_numbers(project, split, limit)
    return Questions(
        [data.examples[number] for number in numbers],
        [data.tokens[number] for number in numbers],
        project.settings.evaluate.room,
    )


def expert_fields(settings: EngineSettings, name: str, path: Path, adapted: Path | None = None) -> dict[str, Any]:
    """An expert's table in the engine's configuration.

    Args:
        path: of a model, or of an adapter.
        adapted: the model that an adapter is of, where that is not the served base itself, but what a trained one was.
    """
    if not is_adapter(path):
        return {"name": name, "model": str(path), **settings.lane(name)}
    if adapted is None:
        return {"name": name, "adapter": str(path)}
    return {"name": name, "model": str(adapted), "adapter": str(path), **settings.lane("base")}


def engine_config(
    settings: EngineSettings, base: Path, experts: dict[str, Path], gate: Path | None, adapted: Path | None = None
) -> EngineConfig:
    """The engine's configuration for these models; without experts it serves the base alone.

    Args:
        adapted: as in :func:`expert_fields`.
    """
    backend = settings.backend
    return EngineConfig(
        base=LaneConfig.model_validate({**settings.lane("base"), "backend": backend, "model": str(base)}),
        experts=tuple(
            ExpertConfig.model_validate({"backend": backend, **expert_fields(settings, name, path, adapted)})
            for name, path in experts.items()
        ),
        gate=GateConfig(path=None if gate is None else str(gate)),
        scheduler=SchedulerConfig(max_num_seqs=settings.max_num_seqs),
    )


class Pair:
    """A running engine that answers questions greedily. Use it in a ``with`` statement.

    Args:
        tokenizer: the base's.
        templates: by lane, the tokenizers of members with the base's vocabulary that read conversations by chat
            templates of their own.

    Raises:
        TrainingError: the engine refuses the models, in its own words.
    """

    def __init__(self, config: EngineConfig, tokenizer: Any, templates: Mapping[int, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        self._templates = dict(templates or {})
        with tqdm(total=0, desc="engine starts", bar_format="{desc}: {elapsed}") as bar:
            try:
                self._engine = Engine(config, on_progress=lambda line: bar.set_description(f"engine: {line}"))
            except EngineStartupError as error:
                raise TrainingError(f"the engine does not start: {error}") from error
        self._warm = False
        self._answered = 0
        # By lane, the tokenizers of experts with vocabularies of their own.
        info = self._engine.info
        own = info.lanes if info.vocabularies == "spelled" else []
        self._own = {lane: load_tokenizer(each.tokenizer) for lane, each in enumerate(own) if lane and each.tokenizer}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.shutdown()

    def answer(
        self,
        questions: Questions,
        label: str,
        *,
        policy: PolicyName | None = None,
        threshold: float | None = None,
        rate: float = 0.0,
        member: int | None = None,
        veto: float | None = None,
        regret: float | None = None,
        blend: dict[str, Any] | None = None,
        strategy: StrategyName | None = None,
        samples: int = 0,
        seed: int = 0,
    ) -> Result:
        """Answer all questions together.

        Args:
            member: a lane alone: 0 the base, k expert k; None is the joint model under ``policy``.
            veto: see :class:`~engine.types.Collaboration`, as for ``regret`` and ``strategy``.
            blend: the fields of a :class:`~engine.blends.Blend`.
            samples: the likeliest of so many answers sampled at ``SAMPLE_TEMPERATURE`` counts; all cost.
            seed: of the random policy's draws, and of samples.

        Raises:
            TrainingError: the engine fails a request or ends; nothing of this call is kept.
        """
        collaboration = Collaboration(
            member=member,
            policy=policy,
            threshold=threshold,
            rate=rate,
            veto=veto,
            regret=regret,
            blend=None if blend is None else msgspec.convert(blend, Blend),
            strategy=strategy,
        )
        if not self._warm:
            # A lane's first steps compile and allocate; they are no part of what is timed. All lanes', whoever is asked
            # first: it may be the base alone.
            self._warm = True
            few = Questions(questions.examples[:2], questions.tokens[:2], questions.room)
            for lane in range(len(self._engine.info.lanes)):
                self.complete(few, Collaboration(member=lane), "warm up")
            self.complete(few, collaboration, "warm up", seed=seed)
        # Each set reads its prompts anew, as a server reads new ones: from the lanes' prefix caches all sets but the
        # first would have them for nothing.
        self._answered += 1
        salt = f"set {self._answered}"
        started = time.monotonic()
        if not samples:
            completions = self.complete(questions, collaboration, label, seed=seed, salt=salt)
            return self.result(questions, completions, time.monotonic() - started, member)
        tries = [
            self.complete(
                questions,
                collaboration,
                f"{label} {number + 1}",
                seed=seed * samples + number,
                temperature=SAMPLE_TEMPERATURE,
                logprobs=0,
                salt=salt,
            )
            for number in range(samples)
        ]
        seconds = time.monotonic() - started
        likeliest = [max(each, key=mean_logprob) for each in zip(*tries, strict=True)]
        spent = [self.result(questions, each, seconds, member) for each in tries]
        return replace(
            self.result(questions, likeliest, seconds, member),
            expert_seconds=sum(each.expert_seconds for each in spent),
            lane_seconds=sum(each.lane_seconds for each in spent),
        )

    def result(
        self, questions: Questions, completions: Sequence[Completion], seconds: float, member: int | None = None
    ) -> Result:
        """What :meth:`complete` brought, as answers.

        Args:
            seconds: that they took together.
            member: the lane alone that wrote them.
        """
        found = zip(questions.examples, completions, strict=True)
        lanes = [spent for completion in completions if completion.cost for spent in enumerate(completion.cost.seconds)]
        return Result(
            [self._answer(example, completion, member) for example, completion in found],
            seconds,
            expert_seconds=sum(spent for lane, spent in lanes if lane > 0),
            lane_seconds=sum(spent for _, spent in lanes),
        )

    def complete(
        self,
        questions: Questions,
        collaboration: Collaboration,
        label: str,
        *,
        seed: int = 0,
        temperature: float = 0.0,
        logprobs: int | None = None,
        salt: str | None = None,
    ) -> list[Completion]:
        """The questions' completions, in their order.

        Args:
            label: of the progress bar.
            seed: each question draws by one of its own, derived from this.
            logprobs: as in :class:`~engine.types.SamplingSpec`.
            salt: the prefix caches are shared with what has the same.

        Raises:
            TrainingError: the engine fails a request or ends.
        """
        requests = []
        member = collaboration.member
        for number, (example, tokens) in enumerate(zip(questions.examples, questions.tokens, strict=True)):
            begun = questions.begun[number] if questions.begun else []
            room = len(tokens.completion) - len(begun) + questions.room
            sampling = SamplingSpec(
                temperature=temperature,
                seed=seed * 1_000_003 + number,
                max_tokens=room if questions.most is None else min(room, questions.most),
                logprobs=logprobs,
                cache_salt=salt,
            )
            readers = self._own if example.conversation is None else {**self._templates, **self._own}
            prompt = example.prompt_ids(readers[member]) if member in readers else tokens.prompt
            others = () if member is not None else tuple(readers.items())
            prompts = tuple((lane, example.prompt_ids(reader) + begun) for lane, reader in others)
            asked = msgspec.structs.replace(collaboration, prompts=prompts) if prompts else collaboration
            requests.append(GenerationRequest(str(number), prompt + begun, sampling, asked))
        with tqdm(total=len(requests), desc=label, unit="answer", mininterval=1, leave=False) as bar:
            try:
                completions = self._engine.generate(requests, on_done=lambda _: bar.update(1))
            except EngineDeadError as error:
                raise TrainingError(f"{label}: {error}") from error
        for completion in completions:
            if completion.finish_reason == "error":
                raise TrainingError(f"{label}: question {completion.request_id}: {completion.error}")
        return completions

    def _answer(self, example: Example, completion: Completion, member: int | None) -> Answer:
        ended = completion.finish_reason == "stop"
        tokenizer = self._tokenizer if member is None else self._own.get(member, self._tokenizer)
        if completion.texts:
            text = b"".join(completion.texts).decode(errors="replace")
        else:
            text = tokenizer.decode(completion.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Answer(
            example.task,
            text,
            example.completion,
            ended,
            completion.sources,
            example.complete,
            len(completion.regretted),
        )


def pair_of(project: Project, base: Path, gate: Path | None, *, experts: bool = True) -> Pair:
    """A base with the project's experts as they are served: with the engine's settings, and the chat templates that
    each reads by.

    Args:
        gate: folder of an artifact; None serves only what needs none.
        experts: whether there are any beside the base.

    Raises:
        TrainingError: see :class:`Pair`.
    """
    paths = project.expert_paths if experts else {}
    # What adapters are of, where the base that is served has been trained.
    adapted = None if base == project.base else project.base
    config = engine_config(project.settings.engine, base, paths, gate, adapted)
    return Pair(config, project.tokenizer, project.own_templates if experts else {})
