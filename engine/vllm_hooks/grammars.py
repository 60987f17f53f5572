"""A request's grammar in a lane: masks, and when the answer may end."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

from engine.grammar.worker import Setup
from engine.types import SamplingSpec, StructuredOutputs

if TYPE_CHECKING:
    from vllm.config import VllmConfig

MASK_SECONDS_AT_ONCE = 0.2
MASK_SECONDS_PER_TOKEN = 0.01
"""Processor time that a request's masks may take: so much in advance, and so much more with every token. All
requests of a batch wait for each other's masks."""

TOO_COMPLEX = "the form became too complex to follow"
_NOT_ALLOWED = "doesn't satisfy the grammar"
"""In the back end's message where a token is not what the form allows; else it has met one of its own bounds."""


def setup_of(tokenizer: Any, vocab_size: int, ends: list[int], *, any_whitespace: bool) -> Setup | None:
    """What is needed to read forms for a tokenizer; None if it is not a fast one, whose content can be handed on.

    Args:
        tokenizer: vLLM's.
        vocab_size: ids that may be written are in [0, vocab_size).
        ends: ids that end a text, the first one being the primary.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(backend.to_str())
    copy.no_padding()
    copy.no_truncation()
    size = max(vocab_size, copy.get_vocab_size(with_added_tokens=True), *(end + 1 for end in ends), 0)
    return Setup(copy.to_str(), size, ends[0] if ends else None, any_whitespace, seconds=2, memory=1 << 30)


class LaneGrammar(StructuredOutputGrammar):
    """What a request's next token may be, as vLLM asks for it.

    The answer ends where the form is complete: the end tokens and the request's own stop tokens are allowed there, and
    nowhere else unless they are text. Before ``min_tokens`` (and with ``ignore_eos`` at any time) they are allowed only
    where nothing else is.

    Args:
        matcher: of this request and lane alone.
        spec: the request's sampling parameters.
        ends: ids that end a text.
        primary: the one that the matcher knows.
    """

    def __init__(self, matcher: Any, spec: SamplingSpec, ends: Iterable[int], primary: int) -> None:
        self._matcher = matcher
        self._primary = primary
        self._ends = list(dict.fromkeys((primary, *ends)))
        self._stops = [token for token in spec.stop_token_ids if token not in self._ends]
        self._min_tokens = spec.min_tokens
        self._ignores_ends = spec.ignore_eos
        self._length = 0
        self._credit = MASK_SECONDS_AT_ONCE
        self.problem: str | None = None

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        """Advance by decided tokens; False if one of them breaks the form, or makes it too complex: a problem."""
        for token in tokens:
            begin = time.thread_time()
            if not self._matcher.consume_token(token):
                if _NOT_ALLOWED not in self._matcher.get_error():
                    self.problem = TOO_COMPLEX
                return False
            self._length += 1
            self._credit -= time.thread_time() - begin
        return True

    def fill_bitmask(self, bitmask: torch.Tensor, batch_index: int) -> None:
        """Write the mask of the next token; on a problem everything is allowed, and nobody takes the sample."""
        begin = time.thread_time()
        words = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.int32)
        self._credit = min(MASK_SECONDS_AT_ONCE, self._credit + MASK_SECONDS_PER_TOKEN)
        self._credit -= time.thread_time() - begin
        row = bitmask[batch_index].numpy()
        if self._matcher.is_error():
            self.problem = TOO_COMPLEX
        elif self._credit < 0:
            self.problem = "the form's masks take too long: other requests would wait for them"
        else:
            size = min(len(words), len(row))
            row[:size] = words[:size]
            row[size:] = 0
            self._set_ends(row)
            if row.any():
                return
            self.problem = "no token of the vocabulary continues the answer"
        row[:] = -1

    def _set_ends(self, row: np.ndarray) -> None:
        complete = _bit(row, self._primary)
        text_stops = [token for token in self._stops if _bit(row, token)]
        for token in (*self._ends, *self._stops):
            _set(row, token, value=False)
        early = self._length < self._min_tokens
        if complete and not (early or (self._ignores_ends and not self._stops)):
            allowed = [*([] if self._ignores_ends else self._ends), *self._stops]
        elif not early:
            allowed = text_stops
        else:
            allowed = []
        if not allowed and not row.any():
            # Nothing but the end is left.
            allowed = self._ends if complete else text_stops
        for token in allowed:
            _set(row, token, value=True)

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        """Only speculative decoding inside vLLM asks, which lanes do not use."""
        raise NotImplementedError

    def rollback(self, num_tokens: int) -> None:
        """Only speculative decoding inside vLLM asks, which lanes do not use."""
        raise NotImplementedError

    def is_terminated(self) -> bool:
        """Never: after the end there is no mask to be asked for."""
        return False

    def reset(self) -> None:
        """Nobody asks: a request that starts anew gets another grammar."""
        raise NotImplementedError


class VllmForms:
    """Forms for back ends of a user's own choice: vLLM itself reads them.

    Checking one takes time, steps wait for it, and the choices of a request all have the same one: results are kept.

    Args:
        tokenizer: vLLM's; None with skip_tokenizer_init.
    """

    def __init__(self, config: VllmConfig, tokenizer: Any) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._checked = lru_cache(128)(self._check)

    def params(self, form: StructuredOutputs) -> StructuredOutputsParams:
        """A form as vLLM takes it.

        Raises:
            VLLMValidationError, ValueError: what vLLM or the back end has against it.
        """
        found = self._checked(form)
        if isinstance(found, Exception):
            # The same object as last time: its traceback must not grow.
            raise found.with_traceback(None)
        return found

    def _check(self, form: StructuredOutputs) -> StructuredOutputsParams | ValueError | VLLMValidationError:
        params = StructuredOutputsParams(
            json=form.json,
            json_object=form.json_object or None,
            regex=form.regex,
            choice=list(form.choice) if form.choice is not None else None,
            grammar=form.grammar,
        )
        config = self._config
        try:
            # Also chooses the back end.
            SamplingParams(structured_outputs=params).verify(
                config.model_config, None, config.structured_outputs_config, self._tokenizer
            )
        except (ValueError, VLLMValidationError) as error:
            return error
        return params


def _bit(row: np.ndarray, token: int) -> bool:
    return token >> 5 < len(row) and bool(row.view(np.uint32)[token >> 5] >> (token & 31) & 1)


def _set(row: np.ndarray, token: int, *, value: bool) -> None:
    if token >> 5 < len(row):
        bits = row.view(np.uint32)
        if value:
            bits[token >> 5] |= np.uint32(1 << (token & 31))
        else:
            bits[token >> 5] &= np.uint32(0xFFFFFFFF ^ (1 << (token & 31)))
