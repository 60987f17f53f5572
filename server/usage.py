"""What a response took: its usage, and the header Server-Timing."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET

from engine.types import BASE, BLEND
from server.choice import Choice
from server.protocol.responses import (
    CollaborationUsage,
    CompletionTokensDetails,
    MemberUsage,
    PromptTokensDetails,
    Usage,
)
from server.text.pieces import Piece


class UsageCounter:
    """Counts a request's tokens by who wrote them, and takes what its choices cost from the engine's last word.

    Args:
        prompt_tokens: of all prompts, each once.
        choices: of the response.
        lane_names: "base" and the experts.
        member: the lane that is asked for alone; None for the joint model.
    """

    def __init__(
        self, prompt_tokens: int, choices: Sequence[Choice], lane_names: Sequence[str], member: int | None
    ) -> None:
        self._prompt = prompt_tokens
        self._choices = choices
        self._names = lane_names
        self._members = range(len(lane_names)) if member is None else (member,)
        self._written = [0] * len(lane_names)
        self._blended = 0
        self._bytes = 0
        self._vetoed = 0
        self._regretted = 0

    def add(self, piece: Piece) -> None:
        """Count a piece."""
        self._vetoed += len(piece.vetoed)
        self._regretted += len(piece.regretted)
        self._bytes += sum(end - start for start, end in piece.spans)
        for source in piece.sources:
            if source == BLEND:
                self._blended += 1
            else:
                self._written[source] += 1

    def usage(self) -> Usage:
        """So far."""
        base = self._written[BASE]
        written = sum(self._written) + self._blended
        expert = written - self._blended - base
        details = CompletionTokensDetails(
            base,
            expert,
            self._blended or UNSET,
            self._bytes or UNSET,
            self._vetoed or UNSET,
            self._regretted or UNSET,
        )
        cached = PromptTokensDetails(self._cached_tokens())
        return Usage(self._prompt, written, self._prompt + written, details, cached, self.collaboration())

    def collaboration(self) -> CollaborationUsage:
        """What each member took part with, so far. Negative prompts are the base's work."""
        prompts = [0] * len(self._names)
        seconds = [0.0] * len(self._names)
        queued = 0.0
        costs = [cost for choice in self._choices for cost in (choice.cost, choice.scoring_cost) if cost is not None]
        for cost in costs:
            queued = max(queued, cost.queue_seconds)
            for lane, (tokens, spent) in enumerate(zip(cost.prompt_tokens, cost.seconds, strict=True)):
                member = lane if lane < len(self._names) else BASE
                prompts[member] += tokens
                seconds[member] += spent
        by_source = {
            self._names[member]: MemberUsage(self._written[member], prompts[member], round(seconds[member], 6))
            for member in self._members
        }
        return CollaborationUsage(by_source, round(queued, 6))

    def server_timing(self, total_seconds: float) -> str:
        """The header Server-Timing, in milliseconds: the queue, the request's part of each lane's steps, and all."""
        usage = self.collaboration()
        timings = [("queue", usage.queue_seconds)]
        timings += [(f"lane-{name}", member.seconds) for name, member in usage.by_source.items()]
        timings.append(("total", total_seconds))
        return ", ".join(f"{name};dur={seconds * 1000:.1f}" for name, seconds in timings)

    def _cached_tokens(self) -> int:
        """Prompt tokens that had not to be computed: of each prompt what every choice of it found in the cache."""
        found: dict[int, int] = {}
        for choice in self._choices:
            if choice.cost is not None:
                cached = choice.cost.cached_tokens
                found[choice.prompt_index] = min(cached, found.get(choice.prompt_index, cached))
        return sum(found.values())
