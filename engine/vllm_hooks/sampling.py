"""Random draws of all rows of a step at once.

vLLM gives each seeded request a generator and fills one row of noise after the other: a kernel launch and a reseeding
per row and step. Here a row's noise is a function of its key (see :mod:`engine.draws`) and of the token id, so one
kernel makes it for all rows; a token's noise depends neither on the batch, nor on the width of the vocabulary, nor on
the kind of device. The draw is the Gumbel-max trick: the token of the greatest logit plus noise.

Tensor shapes are suffixes: R rows, V vocabulary.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.sampling_params import SamplingParams
from vllm.triton_utils import HAS_TRITON
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, apply_top_k_top_p
from vllm.v1.sample.sampler import _SAMPLING_EPS as GREEDY

from engine import draws
from engine.types import SamplingSpec

_FEW = 12
"""Rows up to which Python's integers are quicker than arrays."""


def seed_of(spec: SamplingSpec) -> int | None:
    """The seed of a request's rows, of its own where it has none: the generators of all workers begin alike."""
    if spec.seed is None:
        return secrets.randbits(63) if spec.temperature >= GREEDY else None
    # What counts of it, as vLLM keeps it, which takes -1 for no seed at all.
    seed = _signed(spec.seed & ((1 << 64) - 1))
    return seed if seed != -1 else (1 << 63) - 1


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


_GOLDEN_RATIO = _signed(draws.GOLDEN_RATIO)
_FACTORS = tuple(map(_signed, draws.FACTORS))


def _mix(state: torch.Tensor) -> torch.Tensor:
    """:func:`engine.draws.mix` of int64 tensors, whose arithmetic wraps; in place."""
    state.add_(_GOLDEN_RATIO)
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        state.bitwise_xor_((state >> shift) & ((1 << (64 - shift)) - 1)).mul_(factor)
    return state.bitwise_xor_((state >> 31) & ((1 << 33) - 1))


def exact_draw(logits_RV: torch.Tensor, keys_R: torch.Tensor) -> torch.Tensor:
    """Tokens [R] by float64 noise in torch operations, on any device; keys are int64."""
    tokens_V = torch.arange(logits_RV.shape[-1], device=logits_RV.device)
    bits_RV = _mix(keys_R.unsqueeze(-1) ^ tokens_V)
    uniform_RV = (((bits_RV >> 11) & ((1 << 53) - 1)).double() + 0.5) * 2.0**-53
    return (logits_RV - (-uniform_RV.log()).log()).argmax(-1)


def _triton_draw(logits_RV: torch.Tensor, keys_R: torch.Tensor, *, use_fp64: bool) -> torch.Tensor:
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

    rows_R = torch.arange(len(keys_R), device=logits_RV.device)
    # The key holds the position; logits have their temperature already.
    tokens_R: torch.Tensor = gumbel_sample(
        logits_RV,
        rows_R,
        torch.ones(len(keys_R), device=logits_RV.device),
        keys_R,
        torch.zeros_like(rows_R),
        apply_temperature=False,
        is_drafting=False,
        use_fp64=use_fp64,
    )
    return tokens_R


def draw(logits_RV: torch.Tensor, keys_R: torch.Tensor, *, use_fp64: bool = False) -> torch.Tensor:
    """One token per row from softmax(logits), by the quickest kernel that the device has.

    Args:
        logits_RV: float32.
        keys_R: int64, on the same device.
        use_fp64: noise in double precision.
    """
    if logits_RV.device.type == "cpu":
        if not use_fp64 and hasattr(torch.ops._C, "fused_gumbel_argmax"):
            tokens_R: torch.Tensor = torch.ops._C.fused_gumbel_argmax(logits_RV, keys_R)
            return tokens_R
    elif HAS_TRITON:
        return _triton_draw(logits_RV, keys_R, use_fp64=use_fp64)
    return exact_draw(logits_RV, keys_R)


class KeyedSampler:
    """Takes the place of the ``forward`` of vLLM's ``TopKTopPSampler``: same filters, draws by :func:`draw`.

    Rows without a seed get keys from torch's generator, as many at once as there are rows.
    """

    def __init__(self, replaced: TopKTopPSampler) -> None:
        self._logprobs_mode = replaced.logprobs_mode
        self._use_fp64 = replaced.use_fp64_gumbel
        self._rows: Sequence[int] = ()
        self._seeds: Sequence[int] = ()
        self._positions: Sequence[int] = ()

    def prepare(self, rows: Sequence[int], seeds: Sequence[int], positions: Sequence[int]) -> None:
        """Say which rows of the next call have a seed, and where each draws.

        Args:
            rows: of the logits.
            seeds: one per entry of ``rows``.
            positions: see :func:`engine.draws.key`.
        """
        self._rows, self._seeds, self._positions = rows, seeds, positions

    def _keyed(self) -> npt.NDArray[np.int64]:
        if len(self._seeds) > _FEW:
            return draws.keys(self._seeds, draws.TOKEN_STREAM, self._positions).view(np.int64)
        pairs = zip(self._seeds, self._positions, strict=True)
        return np.array([_signed(draws.key(seed, draws.TOKEN_STREAM, at)) for seed, at in pairs], dtype=np.int64)

    def _keys(self, count: int, device: torch.device) -> torch.Tensor:
        rows, self._rows = self._rows, ()
        if len(rows) < count:
            keys_R = torch.randint(-(1 << 63), (1 << 63) - 1, (count,))
        else:
            keys_R = torch.empty(count, dtype=torch.int64)
        if rows:
            keys_R.numpy()[list(rows)] = self._keyed()
        if device.type == "cpu":
            return keys_R
        return keys_R.pin_memory().to(device, non_blocking=True)

    def __call__(
        self, logits: torch.Tensor, generators: dict[int, Any], k: torch.Tensor | None, p: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens [R], and the processed logits or log-probabilities if the engine's mode wants them."""
        logits = apply_top_k_top_p(logits, k, p)
        processed = None
        if self._logprobs_mode == "processed_logits":
            processed = logits
        elif self._logprobs_mode == "processed_logprobs":
            processed = logits.log_softmax(dim=-1, dtype=torch.float32)
        keys_R = self._keys(len(logits), logits.device)
        return draw(logits.float(), keys_R, use_fp64=self._use_fp64), processed


def metadata_of(params: Sequence[SamplingParams], logits_RV: torch.Tensor) -> SamplingMetadata:
    """For rows of which each is sampled by its own parameters: temperature, top_k, top_p, bad words, logprobs."""
    device, vocab_size = logits_RV.device, logits_RV.shape[-1]
    greedy = [of.temperature < GREEDY for of in params]
    top_k = [of.top_k if 0 < of.top_k < vocab_size else vocab_size for of in params]
    top_p = [of.top_p for of in params]
    nothing = torch.empty(0, device=device)
    return SamplingMetadata(
        temperature=None if all(greedy) else on_device([of.temperature for of in params], torch.float32, device),
        all_greedy=all(greedy),
        all_random=not any(greedy),
        top_p=on_device(top_p, torch.float32, device) if min(top_p) < 1 else None,
        top_k=on_device(top_k, torch.int32, device) if min(top_k) < vocab_size else None,
        generators={},
        max_num_logprobs=max((of.logprobs for of in params if of.logprobs is not None), default=None),
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=nothing,
        presence_penalties=nothing,
        repetition_penalties=nothing,
        output_token_ids=[[]] * len(params),
        allowed_token_ids_mask=None,
        bad_words_token_ids={row: of.bad_words_token_ids for row, of in enumerate(params) if of.bad_words_token_ids},
        logitsprocs=LogitsProcessors(),
    )


def on_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of values, copied without waiting for the device."""
    values_R = torch.tensor(values, dtype=dtype)
    return values_R if device.type == "cpu" else values_R.pin_memory().to(device, non_blocking=True)
