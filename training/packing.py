"""Several short texts in one row, each seen by itself: less padding, and the same loss.

Texts in a row are told by their positions, which start anew with each. transformers keeps them apart by that, where a
model's attention can: one with a state that goes through the row (Mamba) cannot.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from training.checkpoints import forward
from training.data import TokenExample
from training.errors import SettingsError

_LENGTH = 6
"""Of the texts with which a model is looked at."""


def rows_of(numbers: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Examples as rows of several, none longer than the longest example: first fit, the longest ones first.

    Args:
        numbers: of the examples, none twice.
        lengths: of all examples, by number.
    """
    by_length = sorted(numbers, key=lambda number: -lengths[number])
    room: list[int] = []
    rows: list[list[int]] = []
    for number in by_length:
        place = next((at for at, left in enumerate(room) if left >= lengths[number]), None)
        if place is None:
            place = len(rows)
            rows.append([])
            room.append(lengths[by_length[0]])
        rows[place].append(number)
        room[place] -= lengths[number]
    return rows


def packed(rows: Sequence[Sequence[TokenExample]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids [B, T], a mask [B, T] of the positions from which a completion token is predicted, and positions [B, T] in
    each example. Padding, on the right, is at position 0 everywhere, so that it is part of no example.
    """
    longest = max(sum(len(example.prompt) + len(example.completion) for example in row) for row in rows)
    tokens_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    predicting_BT = torch.zeros(len(rows), longest, dtype=torch.bool)
    positions_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        start = 0
        for example in row:
            ids = example.prompt + example.completion
            end = start + len(ids)
            tokens_BT[number, start:end] = torch.tensor(ids)
            predicting_BT[number, start + len(example.prompt) - 1 : end - 1] = True
            positions_BT[number, start:end] = torch.arange(len(ids))
            start = end
    return tokens_BT, predicting_BT, positions_BT


@torch.no_grad()
def check_apart(model: PreTrainedModel, vocabulary: int, device: torch.device) -> None:
    """Check that a model sees nothing of the text before another one in its row.

    Raises:
        SettingsError: it does.
    """
    generator = torch.Generator().manual_seed(0)
    draws_3L = torch.randint(vocabulary, (3, _LENGTH), generator=generator)
    before_2L, text_L = draws_3L[:2], draws_3L[2]
    tokens_BT = torch.cat([before_2L, text_L.expand(2, -1)], dim=1).to(device)
    positions_BT = torch.arange(_LENGTH, device=device).repeat(2, 2)
    training = model.training
    model.eval()
    try:
        found_2LV = forward(model, tokens_BT, positions_BT)[1][:, _LENGTH:, :vocabulary].float()
        alone_LV = forward(model, text_L[None].to(device))[1][0, :, :vocabulary].float()
    except TypeError:
        found_2LV = alone_LV = torch.full((1,), torch.nan)
    finally:
        model.train(training)
    # Behind one text, behind another, and without any. What is not quite the same is rounding, in reduced precision.
    largest = alone_LV.abs().max()
    differ, from_alone = (found_2LV[0] - found_2LV[-1]).abs().max(), (found_2LV - alone_LV).abs().max()
    if not (differ <= 0.01 * largest and from_alone <= 0.05 * largest):
        raise SettingsError("train.joint.packing: this base sees other texts in a row: leave packing out")
