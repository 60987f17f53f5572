"""The engine for scripts, evaluation and benches::

with Engine(config) as engine:
    completions = engine.generate([GenerationRequest("0", prompt_token_ids)])
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable
from types import TracebackType
from typing import Any, Self, TypeVar

from engine.client import EngineClient
from engine.config import EngineConfig
from engine.errors import RequestError
from engine.stats import EngineStats
from engine.types import Completion, Delta, EngineInfo, GenerationRequest

_T = TypeVar("_T")


class Engine:
    """The engine for scripts: starts a process, generates, blocks. Not for an event loop: see
    :class:`~engine.client.EngineClient`.

    Raises:
        EngineStartupError: the engine refused; the message is one line.
    """

    def __init__(self, config: EngineConfig, *, on_progress: Callable[[str], None] | None = None) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine-client", daemon=True)
        self._thread.start()
        try:
            self.client = self._call(EngineClient.start(config, on_progress=on_progress))
        except BaseException:
            self._stop()
            raise

    @property
    def info(self) -> EngineInfo:
        """What the engine said of itself when it was ready."""
        return self.client.info

    @property
    def stats(self) -> EngineStats:
        """The latest account."""
        return self.client.stats

    def generate(
        self,
        requests: Iterable[GenerationRequest],
        *,
        on_done: Callable[[Completion], None] | None = None,
    ) -> list[Completion]:
        """Complete all requests together; the result is in their order.

        A request that fails has finish_reason "error" and says why; the others go on.

        Args:
            on_done: called from another thread with each completion as it finishes, e.g. for a progress bar.

        Raises:
            EngineDeadError: the engine is gone.
        """
        return self._call(self._generate(list(requests), on_done))

    def shutdown(self) -> None:
        """End the process. Further calls do nothing."""
        if self._thread.is_alive():
            self._call(self.client.shutdown())
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    async def _generate(
        self, requests: list[GenerationRequest], on_done: Callable[[Completion], None] | None
    ) -> list[Completion]:
        async def one(request: GenerationRequest) -> Completion:
            whole: Delta | None = None
            try:
                async for delta in self.client.generate(request):
                    if whole is None:
                        whole = delta
                    else:
                        whole.merge(delta)
            except RequestError as error:
                whole = Delta(request.request_id, finish_reason="error", error=str(error))
            assert whole is not None
            assert whole.finish_reason is not None
            completion = Completion(
                whole.request_id,
                whole.tokens,
                whole.sources,
                whole.deferrals,
                whole.finish_reason,
                whole.logprobs,
                whole.prompt_logprobs,
                whole.error,
                whole.code,
                whole.support,
                whole.words,
                whole.cost,
                whole.texts,
                whole.looks,
                whole.vetoed,
                whole.regretted,
            )
            if on_done is not None:
                on_done(completion)
            return completion

        return list(await asyncio.gather(*map(one, requests)))

    def _call(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
