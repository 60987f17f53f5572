"""When an expert's step pays, and how far ahead a draft pays: decided from what steps have cost so far.

An expert's step reads all of its weights whether one row waits or thirty. In lockstep nothing else runs meanwhile, so
letting deferred rows wait for company (*gather*), while the base goes on with the others and drafts ahead for those
that wait (*run-ahead*), buys throughput with latency. How long is worth it follows from the marginal value theorem
(Charnov 1976, on foraging: leave a patch when its yield falls to the average of the whole trip): a cycle is some base
steps and the expert step that ends it; it goes on while the next base step gains markedly more tokens per second than
the cycle would have gained on the whole if it ended now.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from engine.strategies.base import Outlook

LEAST_PROBABILITY = 0.05
"""Of standing, that a draft must have however little its place in a step seems to cost."""

MARGIN = 1.15
"""How much faster than the whole cycle the next base step must gain for parked rows to wait for it. At 1 throughput is
greatest, but near its top it is flat: the last of it would be bought with long waits."""

Gather = Literal["auto", "off"] | int


class Agreement:
    """How often an expert writes the token that the base drafted, with the past fading out.

    Attributes:
        rate: 0 to 1; one half until there is evidence.
    """

    _MEMORY = 0.995

    def __init__(self) -> None:
        self._agreed, self._seen = 1.0, 2.0
        self.rate = 0.5

    def observe(self, agreed: bool) -> None:
        """Take in one position at which the expert has spoken."""
        self._agreed = self._agreed * self._MEMORY + agreed
        self._seen = self._seen * self._MEMORY + 1.0
        self.rate = self._agreed / self._seen


class StepCost:
    """A lane's step time as an affine function of the tokens computed, fitted by least squares with a fading past.

    The intercept is what every step costs (reading the weights, starting kernels), the slope what one more token adds.
    On a GPU the slope of decoding is next to nothing, that of prompts is not, and these are so long that a few of them
    would decide: steps count the less, the more tokens beyond the usual they compute. And now and then a step takes a
    thousand times as long as others (the first one, a kernel that is compiled).
    """

    _MEMORY = 0.98
    _LONG = 3.0
    """Times the usual number of tokens, from which on a step counts less."""
    _ODD = 4.0
    """Times longer or shorter than expected, beyond which a step, or the past, is not to be trusted."""

    def __init__(self) -> None:
        self._usual = 0.0
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self._rows = 0.0

    @property
    def known(self) -> bool:
        """Whether any step has been seen."""
        return self._weight > 0

    def observe(self, tokens: int, rows: int, seconds: float) -> None:
        """Take in one step."""
        memory = self._MEMORY
        limit = self._LONG * self._usual
        weight = 1.0 if not limit or tokens <= limit else (limit / tokens) ** 4
        # The median, by small steps of equal size up and down.
        self._usual = self._usual * (1.05 if tokens > self._usual else 1 / 1.05) if self._usual else float(tokens)
        if self._weight:
            expected = self.seconds(tokens)
            if seconds > self._ODD * expected > 0:
                seconds = self._ODD * expected
            elif seconds * self._ODD < expected and weight == 1.0:
                memory = 0.1
        self._weight = self._weight * memory + weight
        self._x = self._x * memory + weight * tokens
        self._y = self._y * memory + weight * seconds
        self._xx = self._xx * memory + weight * tokens * tokens
        self._xy = self._xy * memory + weight * tokens * seconds
        self._rows = self._rows * memory + weight * rows

    @property
    def tokens_per_row(self) -> float:
        """Mean number of tokens that a row computed in a step."""
        return self._x / self._rows if self._rows else 1.0

    @property
    def slope(self) -> float:
        """Seconds that one more token adds; 0 while steps have not differed."""
        mean = self._x / self._weight
        variance = self._xx / self._weight - mean * mean
        if variance < 1e-9 * max(1.0, mean * mean):
            return 0.0
        covariance = self._xy / self._weight - mean * self._y / self._weight
        # Noise can fit a slope below 0, or one so steep that an empty step would cost less than nothing.
        return min(max(0.0, covariance / variance), self._y / self._x)

    def seconds(self, tokens: float) -> float:
        """Expected duration of a step that computes ``tokens``."""
        mean = self._x / self._weight
        return max(0.0, self._y / self._weight + self.slope * (tokens - mean))


class Pacer:
    """Decides when a parked lane steps and which drafts pay.

    Args:
        lanes: number of lanes; 0 is the base.
        gather: "auto" weighs costs; "off" never lets a row wait for others; a number waits for that many rows.
        max_wait: seconds after which the longest waiting row is not held back any more.
        guests: whether an expert's rows are computed in the base's steps.
        clock: seconds, the scheduler's; a parameter for tests.
    """

    def __init__(
        self,
        lanes: int,
        *,
        gather: Gather = "auto",
        max_wait: float = 0.2,
        guests: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gather: Gather = gather
        self._max_wait = max_wait
        self._guests = guests
        self._clock = clock
        self._costs = [StepCost() for _ in range(lanes)]
        # Per expert lane, since its last step: tokens gained by the base's steps, and seconds spent on them.
        self._gained = [0.0] * lanes
        self._spent = [0.0] * lanes
        # Of these, what had come together when the lane's step was launched that is under way.
        self._at_launch: dict[int, tuple[float, float]] = {}
        self._tokens_per_second = 0.0

    def launch(self, lane: int) -> None:
        """A step of a lane is launched, and ends a cycle: what the base's later steps bring belongs to the next one."""
        if lane:
            self._at_launch[lane] = self._gained[lane], self._spent[lane]

    def observe(self, lane: int, tokens: int, rows: int, seconds: float, gained: float = 0.0) -> None:
        """Take in one step of a lane; ``gained`` is what the base's step brought, as in :class:`Outlook`."""
        cycle_gained, cycle_spent = self._at_launch.pop(lane, (self._gained[lane], self._spent[lane]))
        if not rows:
            return
        self._costs[lane].observe(tokens, rows, seconds)
        if lane:
            if cycle_gained:
                self._note_rate(cycle_gained / (cycle_spent + seconds))
            self._gained[lane] -= cycle_gained
            self._spent[lane] -= cycle_spent
            return
        for expert in range(1, len(self._costs)):
            self._gained[expert] += gained
            self._spent[expert] += seconds
        if self._guests and gained and seconds:
            self._note_rate(gained / seconds)

    def _note_rate(self, tokens_per_second: float) -> None:
        share = 0.1 if self._tokens_per_second else 1.0
        self._tokens_per_second += (tokens_per_second - self._tokens_per_second) * share

    def should_wait(self, lane: int, outlook: Outlook) -> bool:
        """Whether an expert's lane should wait, given that the base has just stepped and can step again."""
        if not outlook.parked or outlook.alone or outlook.progress <= 0 or outlook.since is None:
            return False
        if self._clock() - outlook.since >= self._max_wait:
            return False
        if outlook.fixed_window == outlook.parked:
            return True
        if isinstance(self._gather, int):
            return outlook.parked < self._gather
        if self._gather == "off" and outlook.drafting < outlook.parked:
            return False
        return self._pays(lane, outlook)

    def _pays(self, lane: int, outlook: Outlook) -> bool:
        base, expert = self._costs[0], self._costs[lane]
        gained = self._gained[lane]
        if not expert.known or not gained:
            return False
        # Rows that the next base step is expected to park make the expert's step longer.
        parks = outlook.progress * outlook.parked / gained
        row = expert.slope * expert.tokens_per_row
        marginal = base.seconds(max(1.0, outlook.progress)) + row * parks
        cycle = self._spent[lane] + expert.seconds(outlook.parked * expert.tokens_per_row)
        return outlook.progress / marginal > MARGIN * gained / cycle

    def draft_pays(self, probability: float) -> bool:
        """Whether a draft that stands with this probability gains more than its place in both lanes' steps costs."""
        if not self._tokens_per_second:
            return probability >= 0.5
        base, *experts = self._costs
        slopes = [costs.slope for costs in experts if costs.known]
        if self._guests:
            slopes.append(base.slope)
        dearest = max(slopes, default=0.0)
        return probability > max((base.slope + dearest) * self._tokens_per_second, LEAST_PROBABILITY)
