"""This project's engine without HTTP: a process of its own, driven through :class:`engine.client.EngineClient`."""

from __future__ import annotations

from copy import deepcopy

from pydantic import ValidationError

from bench import processes, reaper
from bench.account import Account
from bench.contenders.base import Stamp
from bench.errors import BenchError
from bench.settings import Settings
from bench.workload import Cell, Job
from engine.blends import Blend
from engine.client import EngineClient
from engine.config import EngineConfig, ExpertConfig, GateConfig, LaneConfig, SchedulerConfig
from engine.errors import CollmError
from engine.stats import EngineStats
from engine.types import BASE, Collaboration, Delta, GenerationRequest, RunAhead, SamplingSpec


def engine_config(settings: Settings) -> EngineConfig:
    """The pair as this project serves it, to both of its contenders.

    Raises:
        BenchError: a scheduler setting that the engine refuses.
    """
    pair = settings.pair
    overlapped = settings.scheduler.get("coordination") == "overlapped"

    def lane(member_name: str) -> dict[str, object]:
        number = 0 if member_name == "base" else 1
        member = (pair.base, pair.expert)[number]
        place: dict[str, object] = {}
        if settings.two_devices:
            place = {"executor": "mp", "devices": (number,)}
        elif overlapped and number:
            place = {"executor": "mp"}
        return {
            "model": str(member.path),
            "kv_cache_memory_bytes": settings.kv_bytes(member),
            "vllm": settings.engine_options(member),
            **place,
        }

    try:
        scheduler = SchedulerConfig.model_validate({"max_num_seqs": settings.max_num_seqs, **settings.scheduler})
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"]))
        message = (
            problem["msg"].removeprefix("Value error, ").replace("Extra inputs are not permitted", "no such setting")
        )
        raise BenchError(f"--scheduler {name}: {message}") from None
    return EngineConfig(
        base=LaneConfig.model_validate(lane("base")),
        experts=(ExpertConfig.model_validate({"name": pair.expert_name, **lane("expert")}),),
        gate=GateConfig(path=str(pair.gate) if pair.gate is not None else None),
        scheduler=scheduler,
    )


def engine_request(
    job: Job, run_ahead: RunAhead | None = None, member: int | None = None, blend: Blend | None = None
) -> GenerationRequest:
    """A job as the engine takes it.

    Args:
        run_ahead: None leaves it to the engine's settings.
        member: lane that is to write alone; None is the pair.
        blend: what is to be written where the experts are asked.
    """
    sampling = SamplingSpec(
        temperature=job.sampling.temperature,
        top_p=job.sampling.top_p,
        seed=job.seed,
        ignore_eos=True,
        max_tokens=job.max_tokens,
    )
    if job.deferral == "gate":
        collaboration = Collaboration(run_ahead=run_ahead, member=member, blend=blend)
    else:
        collaboration = Collaboration(
            policy="random", rate=job.deferral, run_ahead=run_ahead, member=member, blend=blend
        )
    return GenerationRequest(job.name, job.prompt, sampling, collaboration)


class EngineService:
    """The engine's process, and a running account of what it says of itself."""

    def __init__(self, config: EngineConfig, name: str = "engine") -> None:
        self.name = name
        self._config = config
        self._client: EngineClient | None = None
        self.account = Account.of(1 + len(config.experts))

    @property
    def client(self) -> EngineClient:
        """Sends requests; there is one while the service runs."""
        assert self._client is not None
        return self._client

    @property
    def pid(self) -> int:
        """The engine process's id."""
        return self.client.pid

    async def start(self) -> None:
        """See :class:`~bench.contenders.base.Service`."""
        try:
            self._client = await EngineClient.start(self._config)
        except CollmError as error:
            raise BenchError(str(error)) from error
        reaper.look_after(self._client.pid)
        self.account = Account.of(1 + len(self._config.experts))
        self._client.on_batch(self._add)

    async def stop(self) -> None:
        """See :class:`~bench.contenders.base.Service`."""
        client, self._client = self._client, None
        if client is not None:
            processes.thaw(client.pid)  # frozen it would be killed in the end, and what it has started be left frozen
            await client.shutdown()

    def _add(self, deltas: list[Delta], stats: EngineStats) -> None:
        account = self.account
        account.loop_seconds, account.step_seconds = stats.loop_seconds, stats.step_seconds
        account.accepted, account.discarded = stats.runahead_accepted, stats.runahead_discarded
        account.agreements = stats.agreements
        for lane, report in enumerate(stats.lanes):
            # In lockstep a batch has at most one step of each lane, and this is exact; else it is an estimate.
            account.rows[lane] += report.rows * (report.steps - account.steps[lane])
            account.steps[lane] = report.steps
            account.computed[lane] = report.computed_tokens
            account.lane_seconds[lane] += sum(report.step_seconds)
            account.device_seconds[lane] = report.device_seconds
        for delta in deltas:
            account.tokens += len(delta.tokens)
            account.expert_tokens += sum(source != BASE for source in delta.sources)


class EngineAlone:
    """See the module's docstring; :class:`~bench.contenders.base.Contender` for the contract.

    Args:
        run_ahead: asked for with every job; None leaves it to the engine's settings.
        member: lane that writes everything alone; None is the pair.
        blend: what is written where the experts are asked; None is the expert's own token.
    """

    slow = False

    def __init__(
        self,
        service: EngineService,
        name: str = "engine",
        run_ahead: RunAhead | None = None,
        member: int | None = None,
        blend: Blend | None = None,
    ) -> None:
        self._service = service
        self._run_ahead = run_ahead
        self._member = member
        self._blend = blend
        self.name = name
        self.services = (service,)

    def takes(self, cell: Cell) -> bool:
        """All cells; without a gate there is none to ask."""
        return True

    async def open(self) -> None:
        """Nothing to open."""

    def request(self, job: Job) -> GenerationRequest:
        """The job as this contender has the engine do it."""
        return engine_request(job, self._run_ahead, self._member, self._blend)

    async def run(self, job: Job, stamp: Stamp) -> int:
        """Complete one job."""
        tokens = 0
        async for delta in self._service.client.generate(self.request(job)):
            if delta.finish_reason == "error":
                raise BenchError(f"the engine ended {job.name}: {delta.error}")
            if delta.tokens:
                stamp()
            tokens += len(delta.tokens)
        return tokens

    def account(self) -> Account:
        """The engine's account since it started."""
        return deepcopy(self._service.account)

    async def close(self) -> None:
        """Nothing to close."""
