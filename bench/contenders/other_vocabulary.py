"""This project's engine where the expert has a vocabulary of its own: deferral by words, and CharED.

The expert is the pair's own with every token under another id, which for the engine is another vocabulary, and which
writes and costs what the pair's does: what differs is how the members write together.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from msgspec.structs import replace

from bench.contenders.engine_alone import EngineAlone, EngineService, engine_request
from bench.settings import Settings
from bench.shapes import Pair
from bench.workload import Cell, Job
from engine.types import Collaboration, GenerationRequest


def renumbered(pair: Pair, workdir: Path) -> Pair:
    """The pair with such an expert; made in ``workdir`` if it is not there yet."""
    from engine.checkpoints import CONFIG, Checkpoint
    from engine.gate import GateArtifact
    from training.checkpoints import quiet
    from training.demo.renumbered import renumber

    folder = workdir / f"{pair.name}-{pair.dtype}-renumbered"
    expert, gate = folder / "expert", None
    quiet()
    if not (expert / CONFIG).is_file():
        renumber(pair.expert.path, expert)
    if pair.gate is not None:
        gate = folder / "gate"
        identities = (Checkpoint(expert).identity,)
        dataclasses.replace(GateArtifact.load(pair.gate), expert_identities=identities, calibration=None).save(gate)
    return dataclasses.replace(pair, expert=dataclasses.replace(pair.expert, path=expert), gate=gate)


class Words(EngineAlone):
    """Deferral: the expert writes whole words. Synthetic pairs write no words."""

    def __init__(self, service: EngineService, name: str, settings: Settings) -> None:
        super().__init__(service, name)
        self._last_id = settings.pair.vocab_size - 1

    def request(self, job: Job) -> GenerationRequest:
        """The job, with the expert's prompt in its own tokens."""
        asked = engine_request(job)
        return replace(asked, collaboration=replace(asked.collaboration, prompts=self._prompts(job)))

    def _prompts(self, job: Job) -> tuple[tuple[int, list[int]], ...]:
        return ((1, [self._last_id - token for token in job.prompt]),)


class Characters(Words):
    """CharED of both members at equal weights, for which a "token" is a piece."""

    def takes(self, cell: Cell) -> bool:
        """Where the expert is asked for everything: both members are, for each piece."""
        return cell.deferral == 1.0

    def request(self, job: Job) -> GenerationRequest:
        """The job, to be written by characters."""
        half = ((0, 0.5), (1, 0.5))
        together = Collaboration(strategy="characters", weights=half, prompts=self._prompts(job))
        return replace(engine_request(job), collaboration=together)
