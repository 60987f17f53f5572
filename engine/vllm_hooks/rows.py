"""What is read off the rows that are about to be sampled (gate values, regrets, top probabilities), and what is masked.

Tensor shapes are suffixes: R rows that are sampled in a step, A samples asked for before the end of a row, D hidden
size, V vocabulary, K experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from engine.gate import GateArtifact
from engine.regret import RegretArtifact
from engine.vllm_hooks.record import Recorder

_FEW_RANGES = 4
"""As many ranges of columns are masked one by one."""


class RowReader:
    """Stands between the model and the sampler: reads the gate off the rows that are about to be sampled.

    Args:
        compute_logits: the model's own, hidden_RD -> logits_RV (None on ranks that hold no logits).
        gate: None for a lane without a gate artifact.
        regret: None for a lane without a regret artifact.
        gate_in_head: the last row of the LM head is theta (reference format).
        vocab_size: columns that the gate's features are taken from.
        masked: ranges [begin, end) of columns that are masked, so that neither the reference format's gate nor padding
            nor a token that another member does not have can ever be sampled, and log-probabilities are those of the
            shared vocabulary.
        device: of the model.
    """

    def __init__(
        self,
        compute_logits: Callable[..., torch.Tensor | None],
        *,
        gate: GateArtifact | None,
        regret: RegretArtifact | None,
        gate_in_head: bool,
        vocab_size: int,
        masked: Sequence[tuple[int, int]],
        device: torch.device,
    ) -> None:
        self._compute_logits = compute_logits
        self._gate = gate.function.to(device) if gate is not None else None
        self._regret = regret.function.to(device) if regret is not None else None
        self._gate_in_head = gate_in_head
        self._vocab_size = vocab_size
        # A few ranges are slices; special tokens here and there are one index.
        self._slices = [slice(begin, end) for begin, end in masked] if len(masked) <= _FEW_RANGES else []
        columns = [] if self._slices else [column for begin, end in masked for column in range(begin, end)]
        self._columns_N = torch.tensor(columns, device=device) if columns else None
        self._reading = False
        self._wants_top_probability = False
        self._asked = 0
        self._asked_AV: torch.Tensor | None = None
        self._asked_AD: torch.Tensor | None = None
        self.blend_ends: Callable[[torch.Tensor], torch.Tensor] | None = None
        """Called with the logits of the rows' ends that are about to be sampled; what it returns is sampled."""
        self.recorder: Recorder | None = None
        self.recorded: tuple[torch.Tensor, torch.Tensor] | None = None
        self._gate_RK: torch.Tensor | None = None
        self._top_R: torch.Tensor | None = None
        self._regret_R: torch.Tensor | None = None

    def begin(self, top_probability: bool) -> None:
        """The next call of the model's ``compute_logits`` is for the rows to be sampled."""
        self._reading = True
        self._wants_top_probability = top_probability
        self._asked = 0
        self._gate_RK = self._top_R = self._regret_R = self._asked_AV = self._asked_AD = None
        self.recorded = None

    def expect_asked(self, count: int) -> None:
        """As many of the last rows of that call are of asked positions: masked like all, kept, and not returned."""
        self._asked = count

    def add_asked(self, hidden_AD: torch.Tensor) -> None:
        """Asked positions that are not among the rows of that call: their hidden states."""
        self._asked, self._asked_AD = len(hidden_AD), hidden_AD

    def __call__(self, hidden_RD: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """The model's ``compute_logits``, with the gate read and foreign columns masked."""
        # vLLM calls this a second time for prompt log-probabilities; those rows are ignored.
        reading, self._reading = self._reading, False
        if reading and self._asked_AD is not None:
            hidden_RD = torch.cat((hidden_RD, self._asked_AD))
        logits_RV = self._compute_logits(hidden_RD, *args, **kwargs)
        if logits_RV is None:
            return None
        if reading and self._gate is not None:
            self._gate_RK = self._gate(hidden_RD, logits_RV[:, : self._vocab_size])
        if reading and self._regret is not None:
            self._regret_R = self._regret(hidden_RD, logits_RV[:, : self._vocab_size])[:, 0]
        if reading and self._gate_in_head:
            # A copy: the column is masked next.
            self._gate_RK = logits_RV[:, -1:].to(torch.float32, copy=True)
        if reading and self._asked and self.recorder is not None:
            asked_AV = logits_RV[-self._asked :, : self._vocab_size]
            self.recorded = hidden_RD[-self._asked :], self.recorder.features(asked_AV)
        for columns in self._slices:
            logits_RV[:, columns] = float("-inf")
        if self._columns_N is not None:
            logits_RV.index_fill_(-1, self._columns_N, float("-inf"))
        if reading and self._wants_top_probability:
            logits = logits_RV.float()
            self._top_R = torch.exp(logits.amax(-1) - torch.logsumexp(logits, -1))
        if reading and self._asked:
            self._asked_AV, logits_RV = logits_RV[-self._asked :], logits_RV[: -self._asked]
        if reading and self.blend_ends is not None:
            logits_RV = self.blend_ends(logits_RV)
        return logits_RV

    @property
    def gate_RK(self) -> torch.Tensor | None:
        """Gate values read since :meth:`begin`, on the device: those of the asked positions are the last ones."""
        return self._gate_RK

    @property
    def asked_gate_AK(self) -> torch.Tensor | None:
        """Gate values of the asked positions, on the device."""
        return None if self._gate_RK is None else self._gate_RK[-self._asked :]

    def take_asked(self) -> torch.Tensor | None:
        """Logits of the asked positions, [A, V]; None if there are none, or on ranks that hold no logits."""
        asked_AV, self._asked_AV = self._asked_AV, None
        return asked_AV

    def take(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Gate values [R, K], top probabilities [R] and regrets [R] read since :meth:`begin`, on the device.

        Those of the rows' ends come first, then those of the asked positions.
        """
        taken = self._gate_RK, self._top_R, self._regret_R
        self._gate_RK = self._top_R = self._regret_R = None
        return taken


def head_width(model: torch.nn.Module) -> int | None:
    """Width of the LM head's input; None where no layer says so. Tied heads are the embedding itself.

    Of a composed model (engine.composed) the anchor's head writes; the other members have heads of their own.
    """
    writer = getattr(model, "anchor", model)
    layers = [layer for layer in writer.modules() if isinstance(layer, VocabParallelEmbedding)]
    heads = [layer for layer in layers if isinstance(layer, ParallelLMHead)] or layers
    return heads[-1].embedding_dim if heads else None
