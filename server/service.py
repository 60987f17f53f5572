"""What the routes share: the running engine (if it runs), the tokenizer, the model table, admission, metrics."""

from __future__ import annotations

import hashlib
import math
import time
from typing import Literal

from fastapi import Request

from engine.types import BASE, EngineInfo
from server import __version__
from server.admission import Admission
from server.blends import BlendTable
from server.engine_port import Engine
from server.errors import ApiError, not_ready
from server.metrics import Metrics
from server.models import ModelTable
from server.settings import ServerConfig, Settings
from server.text.lane_text import LaneText
from server.text.tokenizer import TextTokenizer

Phase = Literal["loading", "ready", "draining", "dead"]


class Service:
    """One served pair.

    Phases: loading -> ready -> draining; dead once the engine is gone, from where a restart leads back to loading.
    Requests are admitted in the phase "ready" alone.
    """

    def __init__(self, settings: Settings, tokenizer: TextTokenizer) -> None:
        lane_names = settings.engine.lane_names
        self.settings = settings
        self.tokenizer = tokenizer
        config = settings.server
        base = LaneText.of(tokenizer, config.special_tokens_in_messages)
        self.chat_template = base.chat_template
        self.guard = base.guard
        self._experts_texts: list[LaneText] = []
        blends = BlendTable(
            settings.blends, lane_names, settings.engine.blend_obstacle, guidance=settings.scheduler.guidance
        )
        self.models = ModelTable(settings.served_model_name, lane_names, blends)
        self.metrics = Metrics(self.models.names, lane_names, vllm_names=config.vllm_metric_names)
        self.metrics.set_limits(settings.scheduler.max_num_seqs, config.max_queued_requests)
        self.admission = _admission(config, settings.scheduler.max_num_seqs, config.max_queued_requests)
        # One at a time: see routes.tokenize.
        self.tokenizing = _admission(config, 1, config.max_queued_tokenize_requests)
        self.created = int(time.time())
        self.phase: Phase = "loading"
        self._engine: Engine | None = None
        self.fingerprint = ""

    def text_of(self, lane: int) -> LaneText:
        """How a lane reads and writes text: as the base does, unless :meth:`read_tokenizers` has found another way."""
        if BASE < lane <= len(self._experts_texts):
            return self._experts_texts[lane - 1]
        return LaneText(self.tokenizer, self.chat_template, self.guard)

    def read_tokenizers(self, info: EngineInfo) -> None:
        """Read those of experts that have vocabularies or chat templates of their own. Takes a while.

        Raises:
            TokenizerError: one cannot be read.
        """
        self.close()
        config = self.settings.server
        if info.vocabularies == "same" and config.chat_templates == "base":
            return
        self._experts_texts = [
            LaneText.of(
                TextTokenizer.load(lane.tokenizer or lane.model, config.tokenizer_threads),
                config.special_tokens_in_messages,
            )
            for lane in info.lanes[1 : len(self.models.lane_names)]
        ]

    def close(self) -> None:
        """End the threads of the experts' own tokenizers."""
        for text in self._experts_texts:
            text.tokenizer.close()
        self._experts_texts = []

    def attach(self, engine: Engine) -> None:
        """The engine is ready; requests are admitted from now on, unless the server is draining already."""
        self._engine = engine
        engine.on_batch(self.metrics.on_batch)
        self.metrics.engine_up(engine.info, engine.pid)
        info = engine.info
        identity = repr((__version__, [(lane.name, lane.model, lane.adapter) for lane in info.lanes], info.gate))
        self.fingerprint = "collm-" + hashlib.sha256(identity.encode()).hexdigest()[:10]
        if self.phase != "draining":
            self.phase = "ready"

    def lose(self) -> None:
        """The engine died."""
        self.phase = "dead"
        self.metrics.engine_down()

    def reload(self) -> None:
        """Another engine is being started to replace the dead one."""
        self._engine = None
        self.phase = "loading"

    def drain(self) -> None:
        """Admit nothing more; what is in flight goes on."""
        if self.phase != "dead":
            self.phase = "draining"

    @property
    def started_engine(self) -> Engine | None:
        """The engine, once it has been ready; it may be dead by now."""
        return self._engine

    def ready_engine(self) -> Engine:
        """The engine, for a new request.

        Raises:
            ApiError: 503, no requests are admitted.
        """
        if self.phase == "ready" and self._engine is not None and self._engine.alive:
            return self._engine
        raise self.not_ready()

    def not_ready(self) -> ApiError:
        """Why no requests are admitted."""
        message = {
            "loading": "The models are still loading.",
            "draining": "The server is shutting down.",
        }.get(self.phase, "The engine is not running.")
        return not_ready(message, self.settings.server.retry_after_s)

    def set_load(self) -> None:
        """Bring the load gauges up to date, before a scrape.

        The engine's account is as old as its last step, so it is bounded by what is really to be written still: when
        nothing is, the gauges say so. A choice that has ended does not wait, though it holds its place until the whole
        response is complete.
        """
        if self._engine is None:
            return
        unfinished = self.admission.unfinished
        running = min(self._engine.stats.running, unfinished)
        self.metrics.set_load(running, unfinished - running)


def service_of(request: Request) -> Service:
    """The application's service."""
    service: Service = request.app.state.service
    return service


def _admission(config: ServerConfig, running: int, queued: int) -> Admission:
    return Admission(running, queued, math.ceil(queued * config.queue_reserve), config.retry_after_s)
