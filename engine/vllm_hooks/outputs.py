"""What a step has sampled, on its way from the device to the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from vllm.v1.outputs import AsyncModelRunnerOutput, LogprobsTensors, ModelRunnerOutput, SamplerOutput

from engine.vllm_hooks.blend import Blending
from engine.vllm_hooks.device_clock import Event
from engine.vllm_hooks.wire import READINGS, Readings


@dataclass(frozen=True)
class Sampled:
    """Samples that stay on the device until somebody asks.

    Attributes:
        tokens_R1: one for each row.
        rows: by request.
        discarded: rows of unfinished chunks, whose samples mean nothing.
    """

    tokens_R1: torch.Tensor
    logprobs: LogprobsTensors | None
    rows: dict[str, int]
    discarded: list[int]


class PendingOutput(AsyncModelRunnerOutput):
    """A step's output, as soon as the device has come to its end. Copies to the host start when this is made.

    Args:
        output: vLLM's; it lacks the samples where these are ``sampled``.
        sampled: None if vLLM has waited for them itself.
        gate_RK: see :meth:`engine.vllm_hooks.rows.RowReader.take`.
        top_R: likewise.
        regret_R: likewise.
        asked: samples of the asked positions, and what they are blends of.
        blending: what the rows' ends are blends of.
        seconds: waits for the step's last kernel, and says how long the device computed.
        event: recorded behind the copies.
    """

    def __init__(
        self,
        output: ModelRunnerOutput,
        sampled: Sampled | None,
        gate_RK: torch.Tensor | None,
        top_R: torch.Tensor | None,
        regret_R: torch.Tensor | None,
        asked: tuple[SamplerOutput, Blending | None] | None,
        blending: Blending | None,
        seconds: Callable[[], float],
        *,
        event: Event,
    ) -> None:
        self._output = output
        self._sampled = sampled
        self._gate_RK = _to_host(gate_RK)
        self._top_R = _to_host(top_R)
        self._regret_R = _to_host(regret_R)
        self._blending = blending
        self._seconds = seconds
        self._event = event
        self._tokens_R1 = None if sampled is None else _to_host(sampled.tokens_R1)
        self._logprobs = _logprobs_to_host(None if sampled is None else sampled.logprobs)
        self._asked_A1: torch.Tensor | None = None
        self._asked_logprobs: LogprobsTensors | None = None
        self._asked_blending: Blending | None = None
        if asked is not None:
            samples, self._asked_blending = asked
            self._asked_A1 = _to_host(samples.sampled_token_ids)
            self._asked_logprobs = _logprobs_to_host(samples.logprobs_tensors)
        event.record()

    @torch.inference_mode()
    def get_output(self) -> ModelRunnerOutput:
        """vLLM's output, with the lane's readings; waits for the device."""
        self._event.synchronize()
        output = self._output
        if self._sampled is not None and self._tokens_R1 is not None:
            output.sampled_token_ids = self._tokens_R1.tolist()
            for row in self._sampled.discarded:
                output.sampled_token_ids[row].clear()
            output.logprobs = None if self._logprobs is None else self._logprobs.tolists()
        support = {}
        if self._blending is not None:
            support = self._blending.support([tokens[0] if tokens else 0 for tokens in output.sampled_token_ids])
        asked = [] if self._asked_A1 is None else self._asked_A1[:, 0].tolist()
        readings = Readings(
            None if self._gate_RK is None else self._gate_RK.tolist(),
            None if self._top_R is None else self._top_R.tolist(),
            asked,
            None if self._asked_logprobs is None else self._asked_logprobs.tolists(),
            {} if self._asked_blending is None else self._asked_blending.support(asked),
            support,
            self._seconds(),
            None if self._regret_R is None else self._regret_R.tolist(),
        )
        setattr(output, READINGS, readings)
        return output


def _to_host(values: torch.Tensor | None) -> torch.Tensor | None:
    """A copy in pinned memory that is complete when the device comes to what is launched next."""
    return None if values is None else values.to("cpu", non_blocking=True)


def _logprobs_to_host(logprobs: LogprobsTensors | None) -> LogprobsTensors | None:
    return None if logprobs is None else logprobs.to_cpu_nonblocking()
