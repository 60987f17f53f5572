"""Rows with different adapters in one batch on a CPU: each is multiplied with its own, rows without one with none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

# vLLM's layers import parts of torch that warn of others.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

NONE = 0
"""vLLM's number of no adapter."""
WIDTHS = (6, 3)
"""Two parts of a packed layer's output, side by side."""
RANK, WIDTH, SLOTS = 4, 5, 2


def _added(adapters: tuple[int, ...], *, ours: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer adds to the output of each token, with our wrapper or vLLM's, and what it should."""
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from engine.vllm_hooks.lora_cpu import GroupedLora, joined

    torch.manual_seed(0)
    a = tuple(torch.randn(SLOTS, 1, RANK, WIDTH) for _ in WIDTHS)
    b = tuple(torch.randn(SLOTS, 1, width, RANK) for width in WIDTHS)
    x_TD, y_TO = torch.randn(len(adapters), WIDTH), torch.randn(len(adapters), sum(WIDTHS))
    wrapper: Any = (GroupedLora if ours else PunicaWrapperCPU)(64, 8, torch.device("cpu"))
    mapping = LoRAMapping(adapters, adapters, is_prefill=True)
    # Adapter 7 lies in the first slot, adapter 9 in the second.
    wrapper.update_metadata(mapping, [7, 9], SLOTS, 100)
    after_TO = y_TO.clone()
    wrapper.add_lora_linear(after_TO, x_TD, *(joined(a, b) if ours else (a, b)), 0.5, WIDTHS)
    expected_TO = torch.zeros_like(y_TO)
    for token, adapter in enumerate(adapters):
        if adapter != NONE:
            slot = [7, 9].index(adapter)
            parts = [
                0.5 * (b_part[slot, 0] @ (a_part[slot, 0] @ x_TD[token])) for a_part, b_part in zip(a, b, strict=True)
            ]
            expected_TO[token] = torch.cat(parts)
    return after_TO - y_TO, expected_TO


@pytest.mark.parametrize(
    "adapters",
    [(0, 0, 0), (7,), (9, 9, 9, 9), (0, 7, 7, 9, 0), (7, 0, 9, 7, 0, 9, 9, 7)],
    ids=["none", "one token", "one adapter", "in runs", "here and there"],
)
def test_each_token_has_its_own_adapter(adapters: tuple[int, ...]) -> None:
    found_TO, expected_TO = _added(adapters, ours=True)
    torch.testing.assert_close(found_TO, expected_TO, atol=1e-5, rtol=1e-4)
    assert not found_TO[[adapter == NONE for adapter in adapters]].any()


def test_what_vllm_writes_into_a_part_is_in_the_whole() -> None:
    from engine.vllm_hooks.lora_cpu import joined

    a, b = joined(
        tuple(torch.zeros(SLOTS, 1, RANK, WIDTH) for _ in WIDTHS),
        tuple(torch.zeros(SLOTS, 1, width, RANK) for width in WIDTHS),
    )
    # As vLLM's layers do it, with an adapter of a lower rank than there is room for.
    a[1][1, 0, :2, :WIDTH].copy_(torch.ones(2, WIDTH))
    b[1][1, 0, : WIDTHS[1], :2].copy_(torch.ones(WIDTHS[1], 2))
    assert a.whole[1].sum(dim=1).tolist() == [0] * RANK + [WIDTH] * 2 + [0] * 2
    assert b.whole[1].sum(dim=1).tolist() == [0] * RANK + [WIDTHS[1]] * 2 + [0] * 2
    assert b.whole[1].sum(dim=0).tolist() == [0] * WIDTHS[0] + [2] * WIDTHS[1]
    a[1][1] = 0
    assert not a.whole.any()


def test_vllms_own_applies_the_last_adapter_to_tokens_without_one() -> None:
    """Why lanes have their own; if this fails, vLLM has mended it."""
    found_TO, expected_TO = _added((0, 7, 9), ours=False)
    torch.testing.assert_close(found_TO[1:], expected_TO[1:], atol=1e-5, rtol=1e-4)
    assert found_TO[0].abs().max() > 0.1
