"""What an adapter in the base's steps is worth, against the same adapter merged into a copy in a lane of its own.

Two engines, one at a time: the base with a LoRA adapter as its expert, and the base with a merged copy. The second
one's base alone is what there is to be compared with. Base and expert have one shape, the base's of the pair.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bench.contenders.engine_alone import EngineAlone, EngineService, engine_config
from bench.coordination import account_record
from bench.report import Bar, Report, spread, table
from bench.rounds import CPU, SPEED, Found, in_turn, ratios
from bench.settings import Settings
from bench.shapes import Member, Pair
from bench.workload import Cell
from engine.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from engine.config import EngineConfig, ExpertConfig
from engine.types import BASE

if TYPE_CHECKING:
    import torch

RANK = 16
_STD = 0.01
"""Of an adapter's matrices: their product is small beside the weights that it is added to."""

GUEST, OWN_LANE, ALONE = "adapter", "merged copy", "base alone"

OWN_LANE_BAR = 1.2
"""Adapter against merged copy, tokens/s, smaller shapes, deferral 0.3."""


async def measure(
    settings: Settings, cells: list[Cell], folder: Path, *, rounds: int, requests: int, max_tokens: int, seed: int
) -> Report:
    """Run every cell in every round in every way; the first round is not counted.

    Args:
        folder: gets adapter and merged copy, if they are not there yet.
        requests: jobs for each place, so that a cell has ``requests`` x concurrency of them.
    """
    adapter, merged = make_adapter(settings.pair, folder / f"{settings.pair.name}-{settings.pair.dtype}-adapter")
    # Where both lanes step what they have at once; deferrals are forced, no gate is asked.
    copied = replace(settings, pair=replace(settings.pair, expert=merged, expert_name="expert", gate=None))
    lanes = EngineService(engine_config(copied))
    guest = EngineService(_guest(engine_config(copied), adapter))
    ways = [
        EngineAlone(guest, GUEST),
        EngineAlone(lanes, OWN_LANE),
        EngineAlone(lanes, ALONE, member=BASE),
    ]
    found = await in_turn(
        "adapters", ways, cells, settings, rounds=rounds, requests=requests, max_tokens=max_tokens, seed=seed
    )
    weights = {
        GUEST: settings.pair.base.weights + adapter.weights,
        OWN_LANE: settings.pair.base.weights + merged.weights,
    }
    return _report(settings, cells, found, weights, max_tokens)


def _guest(config: EngineConfig, adapter: Member) -> EngineConfig:
    expert = ExpertConfig.model_validate({"name": config.experts[0].name, "adapter": str(adapter.path)})
    return EngineConfig.model_validate(config.model_copy(update={"experts": (expert,)}).model_dump())


def make_adapter(pair: Pair, folder: Path) -> tuple[Member, Member]:
    """A LoRA adapter of the pair's base with random matrices, and a copy of the base that it is merged into.

    On the layers that read the hidden state, as most adapters have them, and not on the ones that write it: synthetic
    models lean on what those write.
    """
    import torch
    from safetensors.torch import load_file, save_file

    adapter, merged = folder / "adapter", folder / "merged"
    if not (merged / "config.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        adapter.mkdir(parents=True)
        merged.mkdir()
        generator = torch.Generator().manual_seed(1)
        matrices: dict[str, torch.Tensor] = {}
        for file in sorted(pair.base.path.glob("*.safetensors")):
            tensors = load_file(str(file))
            for name, weight in tensors.items():
                if name.endswith(
                    ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
                ):
                    a, b = (torch.randn(shape, generator=generator) * _STD for shape in _shapes(weight))
                    module = f"base_model.model.{name.removesuffix('.weight')}"
                    matrices |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
                    tensors[name] = (weight.float() + b @ a).to(weight.dtype)
            save_file(tensors, merged / file.name, metadata={"format": "pt"})
        save_file(matrices, adapter / ADAPTER_WEIGHTS)
        fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"], "bias": "none"}
        modules = sorted({name.split(".")[-3] for name in matrices})
        (adapter / ADAPTER_CONFIG).write_text(json.dumps(fields | {"target_modules": modules}))
        # config.json comes last: where it is, everything is there.
        for source in sorted(pair.base.path.iterdir(), key=lambda path: path.name == "config.json"):
            if source.suffix != ".safetensors":
                shutil.copyfile(source, merged / source.name)
    weights = (adapter / ADAPTER_WEIGHTS).stat().st_size
    return Member(adapter, weights, pair.base.kv_bytes_per_token), replace(pair.base, path=merged)


def _shapes(weight: torch.Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    rows, columns = weight.shape
    return (RANK, columns), (rows, RANK)


def _report(
    settings: Settings,
    cells: list[Cell],
    found: Found,
    weights: dict[str, int],
    max_tokens: int,
) -> Report:
    shape = settings.pair.name
    rows, records, bars = [], [], []
    for cell in cells:
        measured = {name: found[cell, name] for name in (GUEST, OWN_LANE, ALONE)}
        guest, lanes, alone = measured.values()
        to_lanes = ratios(guest, lanes, SPEED)
        rows.append(
            [
                str(cell),
                *(spread([one.speed for one in ones]) for ones in measured.values()),
                spread(to_lanes, 2),
                spread(ratios(guest, alone, SPEED), 2),
                *(spread([1e6 * one.cpu_per_token for one in ones]) for ones in measured.values()),
                spread(ratios(guest, lanes, CPU), 2),
                spread(ratios(guest, alone, CPU), 2),
            ]
        )
        records.append(
            {
                "concurrency": cell.concurrency,
                "deferral": cell.deferral,
                "prompt": cell.prompt,
                "tokens_per_second": {name: [one.speed for one in ones] for name, ones in measured.items()},
                "cpu_seconds": {name: [one.cpu_seconds for one in ones] for name, ones in measured.items()},
                "accounts": {name: [account_record(one.account) for one in ones] for name, ones in measured.items()},
            }
        )
        if cell.deferral == 0.3:
            limit = 1.0 if shape in ("S", "1B-8B") else OWN_LANE_BAR
            bars.append(Bar(f"{shape}: adapter / merged copy, tokens/s, {cell}", limit, tuple(to_lanes)))
    resident = {
        name: max(one.resident_bytes for (_, way), ones in found.items() if way == name for one in ones)
        for name in (GUEST, OWN_LANE)
    }
    ways = (GUEST, OWN_LANE, ALONE)
    headers = ["", *ways, "/ merged copy", "/ base alone"]
    headers += [*(f"{name}: CPU us/token" for name in ways), "CPU / merged copy", "CPU / base alone"]
    text = f"### Adapters, {settings.pair.title}, engine alone, tokens/s\n\n"
    text += f"{max_tokens} tokens per request, greedy, LoRA of rank {RANK}.\n\n{table(headers, rows)}\n\n"
    text += "; ".join(
        f"{name}: {weights[name] / 2**20:,.1f} MiB of weights, {resident[name] / 2**20:,.0f} MiB resident"
        for name in resident
    )
    data = {
        "measurement": "adapters",
        "shape": shape,
        "max_tokens": max_tokens,
        "resident_bytes": resident,
        "weight_bytes": weights,
        "cells": records,
    }
    return Report(text + ".", data, bars)
