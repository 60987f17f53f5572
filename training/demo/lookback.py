"""Deferral that may take an expert's token back after reading on, offline and greedy.

A *trace* is how a text goes on under deferral from a prefix on, with what the models said at each position. What
follows a token taken back is the trace of another prefix, so all rules and thresholds share their traces. Positions are
settled in order: one that stands is not looked at again, whatever becomes of the text behind it; at one that does not,
the base's own token stands from then on. So each position is cut at most once.

For experiments on quality, by full recomputation. What a server does (:mod:`engine.strategies.deferral.backtracking`)
is the form that is ``served`` here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from engine.hindsight import NUMBERS, clamped, numbers_of
from training.demo.blending import Rows, write

Policy = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""The base's last hidden states [B, d] and log-probabilities [B, V] -> where the expert writes [B]."""
Rule = Callable[[int, "Trace", int], float]
"""Question, trace, index in it -> how much the expert's token there is regretted."""

BATCH = 256
BASE, EXPERT = "base", "expert"


@dataclass(frozen=True)
class Step:
    """A position, and what was said there.

    Attributes:
        draft: the base's own token.
        base_top: the base's top probability; ``expert_top`` the expert's.
        base_logprob: of the token that was written.
    """

    token: int
    deferred: bool
    draft: int
    base_top: float
    base_logprob: float
    expert_top: float


@dataclass(frozen=True)
class Trace:
    """How a text goes on from a prefix.

    Attributes:
        states_TD: the base's last hidden state before each step, float32.
    """

    prefix: tuple[int, ...]
    steps: tuple[Step, ...]
    states_TD: torch.Tensor

    @property
    def tokens(self) -> tuple[int, ...]:
        """What is written."""
        return tuple(step.token for step in self.steps)

    @property
    def disputed(self) -> list[int]:
        """Indices of steps at which the expert has written something else than the base would have."""
        return [index for index, step in enumerate(self.steps) if step.deferred and step.token != step.draft]


class _Recorder:
    """A rule for :func:`~training.demo.blending.write`: deferral, and a note of each step."""

    def __init__(self, policy: Policy, eos: int, count: int) -> None:
        self._policy = policy
        self._eos = eos
        self._open = list(range(count))
        self.steps: list[list[Step]] = [[] for _ in range(count)]
        self.states: list[list[torch.Tensor]] = [[] for _ in range(count)]

    def __call__(self, rows: Rows, hidden: torch.Tensor) -> torch.Tensor:
        base, expert = (rows[name].log_softmax(-1) for name in (BASE, EXPERT))
        asked = self._policy(hidden, base)
        drafts = base.argmax(-1)
        tokens = torch.where(asked, expert.argmax(-1), drafts)
        columns = (
            tokens, asked, drafts, base.amax(-1).exp(), base.gather(-1, tokens[:, None])[:, 0], expert.amax(-1).exp(),
        )  # fmt: skip
        for place, state, *values in zip(self._open, hidden, *(column.tolist() for column in columns), strict=True):
            self.steps[place].append(Step(*values))
            self.states[place].append(state.clone())
        self._open = [place for place, token in zip(self._open, tokens.tolist(), strict=True) if token != self._eos]
        return torch.where(asked[:, None], expert, base)


class Writer:
    """Writes answers under deferral, each continuation once.

    Args:
        max_tokens: of an answer.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        expert: PreTrainedModel,
        policy: Policy,
        prompts: Sequence[Sequence[int]],
        *,
        eos: int,
        max_tokens: int,
    ) -> None:
        self._models = {BASE: base, EXPERT: expert}
        self._policy = policy
        self._prompts = prompts
        self._eos = eos
        self._max_tokens = max_tokens
        self._known: dict[tuple[int, tuple[int, ...]], Trace] = {}

    def traces(self, prefixes: Mapping[int, tuple[int, ...]]) -> dict[int, Trace]:
        """How each question's answer goes on after its prefix."""
        missing = [key for key in prefixes.items() if key not in self._known]
        # Of about equal length, so that little is padding.
        missing.sort(key=lambda key: len(self._prompts[key[0]]) + len(key[1]))
        for first in range(0, len(missing), BATCH):
            self._write(missing[first : first + BATCH])
        return {key[0]: self._known[key] for key in prefixes.items()}

    def _write(self, keys: Sequence[tuple[int, tuple[int, ...]]]) -> None:
        open_ = []
        for question, prefix in keys:
            if prefix[-1:] == (self._eos,) or len(prefix) >= self._max_tokens:
                self._known[question, prefix] = Trace(prefix, (), torch.empty(0))
            else:
                open_.append((question, prefix))
        if not open_:
            return
        recorder = _Recorder(self._policy, self._eos, len(open_))
        room = self._max_tokens - min(len(prefix) for _, prefix in open_)
        texts = [[*self._prompts[question], *prefix] for question, prefix in open_]
        write(self._models, recorder, texts, max_tokens=room, eos=self._eos)
        for key, steps, states in zip(open_, recorder.steps, recorder.states, strict=True):
            left = self._max_tokens - len(key[1])
            self._known[key] = Trace(key[1], tuple(steps[:left]), torch.stack(states[:left]))


@dataclass
class Outcome:
    """An answer.

    Attributes:
        deferred: how many of its tokens an expert wrote.
        revoked: how many tokens were taken back, each with all behind it that was held.
    """

    tokens: tuple[int, ...] = ()
    deferred: int = 0
    revoked: int = 0


def settle(writer: Writer, questions: Sequence[int], rule: Rule, threshold: float) -> dict[int, Outcome]:
    """Answers in which no expert's token stands that is regretted more than the threshold says."""
    outcomes = {question: Outcome() for question in questions}
    left = list(questions)
    while left:
        traces = writer.traces({question: outcomes[question].tokens for question in left})
        again = []
        for question in left:
            outcome, trace = outcomes[question], traces[question]
            cut = next((i for i in trace.disputed if rule(question, trace, i) > threshold), None)
            kept = trace.steps[:cut]
            outcome.tokens += tuple(step.token for step in kept)
            outcome.deferred += sum(step.deferred for step in kept)
            if cut is not None:
                outcome.tokens += (trace.steps[cut].draft,)
                outcome.revoked += 1
                again.append(question)
        left = again
    return outcomes


@dataclass(frozen=True)
class Reading:
    """What a head looks at.

    Attributes:
        ahead: how many tokens, the expert's first, the base has read when it looks back; 0 is none, not even that one.
        numbers: also how sure both models were, beside the base's hidden state.
        served: no more numbers than a server has at hand, and these are added to what the hidden state says.
    """

    ahead: int
    numbers: bool
    served: bool = False

    @property
    def added(self) -> int:
        """How many of the inputs, the last ones, are added to what the others say."""
        return len(NUMBERS) if self.served else 0

    def __call__(self, trace: Trace, index: int) -> torch.Tensor:
        """Inputs [I] at a step; where the text ends before so much is read, what there is."""
        last = min(index + self.ahead, len(trace.steps) - 1)
        state_D = trace.states_TD[last]
        if not self.numbers:
            return state_D
        step, read = trace.steps[index], trace.steps[index + 1 : last]
        if self.served:
            experts = [each.expert_top for each in read if each.deferred]
            served = numbers_of(step.base_top, step.expert_top, trace.steps[last].base_top, experts)
            return torch.cat([state_D, torch.tensor(served)])
        numbers = [clamped(step.base_top), clamped(step.expert_top), step.base_logprob]
        if self.ahead:
            sure = [each.expert_top for each in read if each.deferred]
            said = [each.base_logprob for each in read]
            numbers += [
                clamped(trace.steps[last].base_top),
                clamped(min(sure, default=1.0)),
                sum(said) / max(1, len(said)),
            ]
        return torch.cat([state_D, torch.tensor(numbers)])


class Head:
    """A probability from inputs: logistic regression, or with one hidden layer of SiLU.

    Args:
        width: of the hidden layer; 0 is none.
        added: so many of the inputs, the last ones, pass the hidden layer by.
    """

    STEPS, LEARNING_RATE, WEIGHT_DECAY = 300, 1e-2, 1e-2

    def __init__(self, inputs_NI: torch.Tensor, width: int, seed: int, added: int = 0) -> None:
        torch.manual_seed(seed)
        self._mean_I, self._scale_I = inputs_NI.mean(0), inputs_NI.std(0).clamp_min(1e-6)
        self._reading = inputs_NI.shape[1] - added
        net: nn.Module = nn.Linear(self._reading, 1)
        if width:
            net = nn.Sequential(nn.Linear(self._reading, width), nn.SiLU(), nn.Linear(width, 1))
        self._net = nn.ModuleList([net, nn.Linear(added, 1, bias=False)] if added else [net])

    @classmethod
    def fit(
        cls,
        learned: tuple[torch.Tensor, torch.Tensor],
        held_out: tuple[torch.Tensor, torch.Tensor],
        *,
        width: int,
        seed: int,
        added: int = 0,
    ) -> Head:
        """By the log loss, all examples at once; of all steps the one with the least loss on held-out examples.

        Args:
            learned: inputs [N, I] and labels [N].
        """
        head = cls(learned[0], width, seed, added)
        optimizer = torch.optim.AdamW(head._net.parameters(), lr=cls.LEARNING_RATE, weight_decay=cls.WEIGHT_DECAY)
        best, kept = math.inf, head._net.state_dict()
        for _ in range(cls.STEPS):
            with torch.no_grad():
                loss = float(head._loss(*held_out))
            if loss < best:
                best, kept = loss, {name: tensor.clone() for name, tensor in head._net.state_dict().items()}
            optimizer.zero_grad()
            head._loss(*learned).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        head._net.load_state_dict(kept)
        head._net.requires_grad_(False)
        return head

    def tensors(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """As a gate with a hidden layer and one expert has them, for inputs as they are; and the added inputs' weights.

        The head must have a hidden layer.
        """
        first, last = (layer for layer in self._net[0].modules() if isinstance(layer, nn.Linear))
        mean_I, scale_I = self._mean_I, self._scale_I
        weight_HI = first.weight / scale_I[: self._reading]
        added_A = [weight_1A[0] for layer in self._net[1:] for weight_1A in layer.parameters()]
        numbers_A = torch.cat([torch.empty(0), *added_A]) / scale_I[self._reading :]
        found = {
            "hidden_weight": weight_HI,
            "hidden_bias": first.bias - weight_HI @ mean_I[: self._reading],
            "theta": last.weight,
            "bias": last.bias - numbers_A @ mean_I[self._reading :],
        }
        return {name: tensor.detach().clone() for name, tensor in found.items()}, numbers_A.detach().clone()

    def __call__(self, inputs_NI: torch.Tensor) -> torch.Tensor:
        """Probabilities [N]."""
        return self._logits(inputs_NI).sigmoid()

    def _logits(self, inputs_NI: torch.Tensor) -> torch.Tensor:
        scaled_NI = (inputs_NI - self._mean_I) / self._scale_I
        parts = scaled_NI[:, : self._reading], scaled_NI[:, self._reading :]
        return torch.stack([part(each)[:, 0] for part, each in zip(self._net, parts, strict=False)]).sum(0)

    def _loss(self, inputs_NI: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        return nn.functional.binary_cross_entropy_with_logits(self._logits(inputs_NI), labels_N.float())


def labelled(
    traces: Mapping[int, Trace], gold: Sequence[Sequence[int]], reading: Reading
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [N, I] at disputed steps, and whether the expert's token was wrong [N].

    Of each answer up to its first wrong token: what follows continues another text.
    """
    inputs, wrong = [], []
    for question, trace in traces.items():
        disputed = set(trace.disputed)
        for index, (step, want) in enumerate(zip(trace.steps, gold[question], strict=False)):
            if index in disputed:
                inputs.append(reading(trace, index))
                wrong.append(step.token != want)
            if step.token != want:
                break
    return torch.stack(inputs), torch.tensor(wrong)
