"""Distributions over byte strings, laid down by a lane whose member writes by characters.

Gathering, normalising and summing up are done for all rows at once, on the lane's device: of a vocabulary of 150,000
entries a row has 2.4 MB then, and nothing of it goes through the scheduler's messages.

Tensor shapes are suffixes: A positions, R rows, V vocabulary, N text tokens, S symbols.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.lanes.shelf import Offer, Shelf
from engine.spelling.mass import END, EXACT, SYMBOLS, Mass
from engine.spelling.vocabulary import Vocabulary
from engine.vllm_hooks.blend import Place


class MassReader:
    """Turns a lane's logits into masses.

    Args:
        vocabulary: the lane's.
        device: of its logits.
    """

    def __init__(self, vocabulary: Vocabulary, device: torch.device) -> None:
        self._vocabulary = vocabulary
        bounds = torch.as_tensor(vocabulary.branches(b"").bounds, dtype=torch.int64, device=device)
        self._begins, self._ends = bounds[:-1], bounds[1:]
        self._order_N = torch.as_tensor(vocabulary.order, dtype=torch.int64, device=device)
        self._stops = torch.tensor(vocabulary.stops, dtype=torch.int64, device=device)

    def lay_down(self, shelf: Shelf, places: Sequence[Place], logits_RV: torch.Tensor) -> None:
        """Lay down what the lane says at those of ``places`` that are of no blend.

        What is no distribution lies there as None.
        """
        wanted = [place for place in places if place.part.blend is None]
        if not wanted:
            return
        rows = torch.tensor([place.row for place in wanted], device=logits_RV.device)
        probabilities_AV = torch.softmax(logits_RV[rows].float(), -1)
        text_AN = probabilities_AV[:, self._order_N].double()
        stops = self._stops[self._stops < logits_RV.shape[-1]]
        end_A = probabilities_AV[:, stops].double().sum(-1)
        total_A = text_AN.sum(-1) + end_A
        text_AN /= total_A.unsqueeze(-1)
        sums_AN = torch.nn.functional.pad(text_AN.cumsum(-1), (1, 0))
        end_A /= total_A
        first_AS = text_AN.new_zeros(len(wanted), SYMBOLS)
        first_AS[:, :EXACT] = (sums_AN[:, self._ends] - sums_AN[:, self._begins]).clamp_min(0)
        first_AS[:, END] = end_A
        ends, totals = end_A.tolist(), total_A.tolist()
        texts, sums, firsts = text_AN.cpu().numpy(), sums_AN.cpu().numpy(), first_AS.cpu().numpy()
        for number, place in enumerate(wanted):
            mass = None
            if 0 < totals[number] < float("inf"):
                mass = Mass.summed(self._vocabulary, texts[number], sums[number], ends[number], firsts[number])
            shelf.put(place.part.lane, place.part.request_id, place.written, Offer(mass))
