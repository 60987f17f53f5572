"""What a step of a composed model costs beside its members' own: it should cost their sum, and little more.

The pair's base is the anchor and its expert the augmenting model, connected as the paper has it: evenly, once for every
four layers of the augmenting model. The connections' weights are random, since steps cost the same whatever they hold.
Beside the duration of a step stands the processor time that it takes, which other work on the machine changes least.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench import processes
from bench.account import Account
from bench.contenders.engine_alone import EngineAlone, EngineService
from bench.context import DecodeWindow
from bench.coordination import account_record
from bench.errors import BenchError
from bench.load import drive
from bench.progress import Progress
from bench.report import Bar, Report, spread, table
from bench.services import running
from bench.settings import Settings
from bench.shapes import DTYPE_BYTES, Member, Pair
from bench.workload import Cell, make_jobs
from engine.config import EngineConfig, ExpertConfig, LaneConfig, SchedulerConfig

BAR = 1.15
"""Greatest ratio of a composed step to the sum of the members' steps."""
LANES = ("composed", "anchor", "augmenting")
_LAYERS_PER_CONNECTION = 4


def compose(pair: Pair, folder: Path) -> Member:
    """The composition of a pair's members on disk, made if it is not there yet."""
    import torch

    from engine.composed.artifact import Composition, Connection, Heads, make_member

    anchor, augmenting = make_member("anchor", pair.base.path), make_member("augmenting", pair.expert.path)
    count = max(1, augmenting.layers // _LAYERS_PER_CONNECTION)
    heads = int(anchor.identity.architecture["num_attention_heads"])
    composition = Composition(
        anchor,
        (augmenting,),
        tuple(
            Connection("augmenting", number * augmenting.layers // count, max(1, number * anchor.layers // (count + 1)))
            for number in range(1, count + 1)
        ),
        Heads(heads, heads, anchor.hidden_size // heads),
    )
    if not (folder / "config.json").exists():
        generator = torch.Generator().manual_seed(0)
        shapes = composition.shapes()
        composition.save(
            folder,
            {name: torch.randn(shape, generator=generator) * 0.1 / shape[1] ** 0.5 for name, shape in shapes.items()},
        )
    element = DTYPE_BYTES[pair.dtype]
    parameters = sum(rows * columns for rows, columns in composition.shapes().values())
    own_cache = 2 * count * anchor.hidden_size * element
    return Member(
        folder,
        pair.base.weights + pair.expert.weights + parameters * element,
        pair.base.kv_bytes_per_token + pair.expert.kv_bytes_per_token + own_cache,
    )


@dataclass(frozen=True)
class _Measured:
    """One lane's decoding in one round; ``cpu_seconds`` is the engine's processor time."""

    lane: int
    account: Account
    cpu_seconds: float

    @property
    def step_seconds(self) -> float:
        """Mean duration of a step."""
        return self.account.lane_step_seconds[self.lane]

    @property
    def step_cpu_seconds(self) -> float:
        """Mean processor time of a step: without what the account says is coordination."""
        return self.cpu_seconds * (1 - self.account.share) / self.account.steps[self.lane]


async def measure(
    settings: Settings, folder: Path, *, concurrency: int, rounds: int, max_tokens: int, seed: int
) -> Report:
    """Decode with each of the three lanes of one engine in turn, in every round; prompts are not in the numbers.

    Args:
        folder: for the composed checkpoint.
    """
    pair = settings.pair
    composed = await asyncio.to_thread(compose, pair, folder)

    def lane(member: Member) -> dict[str, object]:
        options = settings.engine_options(member)
        return {"model": str(member.path), "kv_cache_memory_bytes": settings.kv_bytes(member), "vllm": options}

    members = zip(LANES[1:], (pair.base, pair.expert), strict=True)
    config = EngineConfig(
        base=LaneConfig.model_validate(lane(composed)),
        experts=tuple(ExpertConfig.model_validate({"name": name, **lane(member)}) for name, member in members),
        scheduler=SchedulerConfig.model_validate({"max_num_seqs": settings.max_num_seqs, **settings.scheduler}),
    )
    service = EngineService(config)
    window = DecodeWindow(service)
    found: dict[str, list[_Measured]] = {name: [] for name in LANES}
    cell = Cell(concurrency, 0.0)
    with Progress(rounds * len(LANES), "composed") as progress:
        async with running([service], lambda name: progress.say(f"starting {name}")):
            processes.thaw(service.pid)
            service.client.on_batch(window.note)
            for round_number in range(-1, rounds):
                jobs = make_jobs(pair, cell, concurrency, max_tokens, seed, round_number)
                for number, name in enumerate(LANES):
                    progress.say(f"{pair.name}, {name}")
                    window.begin(concurrency)
                    await drive(EngineAlone(service, name, member=number), jobs, concurrency)
                    if window.account is None or not window.account.steps[number]:
                        raise BenchError(
                            f"a request ended before the last prompt was read: --max-tokens {max_tokens} is too few"
                        )
                    if round_number >= 0:
                        found[name].append(_Measured(number, window.account, window.cpu_seconds))
                        progress.step()
    return _report(settings, composed, found, concurrency, max_tokens)


def _report(
    settings: Settings, composed: Member, found: dict[str, list[_Measured]], concurrency: int, max_tokens: int
) -> Report:
    pair = settings.pair
    members = dict(zip(LANES, (composed, pair.base, pair.expert), strict=True))
    seconds = {name: [one.step_seconds for one in found[name]] for name in LANES}
    cpu = {name: [one.step_cpu_seconds for one in found[name]] for name in LANES}
    rows = [
        [
            name,
            spread(seconds[name], 2, 1e3, " ms"),
            spread(cpu[name], 2, 1e3, " ms"),
            f"{members[name].kv_bytes_per_token / 1024:.1f} KiB",
            f"{members[name].weights / 2**20:.0f} MiB",
        ]
        for name in LANES
    ]
    rows.append(
        ["anchor + augmenting", spread(_sums(seconds), 2, 1e3, " ms"), spread(_sums(cpu), 2, 1e3, " ms"), "", ""]
    )
    heads = ["lane", "a decoding step", "its processor time", "KV cache per token", "weights"]
    text = (
        f"### Composition, {pair.title}, engine alone, {concurrency} rows, {max_tokens} tokens after short prompts\n\n"
        + table(heads, rows)
    )
    data = {
        "measurement": "composition",
        "shape": pair.name,
        "concurrency": concurrency,
        "max_tokens": max_tokens,
        "lanes": {name: [account_record(one.account) for one in measured] for name, measured in found.items()},
        "ratio": _ratios(seconds),
        "cpu_ratio": _ratios(cpu),
    }
    label = f"{pair.name}: composed step / members' steps, {concurrency} rows"
    bars = [
        Bar(label, BAR, tuple(_ratios(seconds)), at_most=True),
        Bar(f"{label}, processor time", BAR, tuple(_ratios(cpu)), at_most=True),
    ]
    return Report(text, data, bars)


def _sums(costs: Mapping[str, list[float]]) -> list[float]:
    """Of both members, per round."""
    return [anchor + augmenting for anchor, augmenting in zip(costs["anchor"], costs["augmenting"], strict=True)]


def _ratios(costs: Mapping[str, list[float]]) -> list[float]:
    """Of the composed model's cost to that of both members, per round."""
    return [whole / parts for whole, parts in zip(costs["composed"], _sums(costs), strict=True)]
