"""Blends as tensor operations, in the worker of the lane that writes.

Tensor shapes are suffixes: S members that take part, A positions, V vocabulary, K experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from engine.blends import Blend
from engine.lanes.interface import Part
from engine.lanes.shelf import Offer, Shelf

RULED_OUT = 1e4
"""What a token loses that a blend rules out. Not everything: a grammar, or a list of allowed tokens, may leave nothing
else, and then the order among these decides. At a temperature of 2 it still is a factor of exp(-5000)."""


class Combined(NamedTuple):
    """Positions of one blend.

    Attributes:
        logits_AV: of the combination, float32. A row that is no distribution (a member's logits are not finite) is 0.
        rows_SAV: the members' own logits.
        norms_SA: ``logsumexp`` of these; NaN where the combination is no distribution.
    """

    logits_AV: torch.Tensor
    rows_SAV: torch.Tensor
    norms_SA: torch.Tensor

    def support(self, tokens_A: torch.Tensor) -> list[list[float]]:
        """[A][S]: each member's log-probability of the token that was drawn; NaN where there was no distribution."""
        index_SA1 = tokens_A.to(self.rows_SAV.device).view(1, -1, 1).expand(len(self.rows_SAV), -1, 1)
        support: list[list[float]] = (self.rows_SAV.gather(-1, index_SA1)[..., 0] - self.norms_SA).T.tolist()
        return support


def combine(rows_SAV: torch.Tensor, blend: Blend, log_weights_SA1: torch.Tensor | None = None) -> Combined:
    """The logits of a blend; see :mod:`engine.blends` for the definitions.

    Args:
        rows_SAV: float32, members in the order of ``blend.weights``; -inf is a token that must not be written.
        log_weights_SA1: for a mixture by the gate.
    """
    norms_SA = torch.logsumexp(rows_SAV, -1)
    if blend.kind == "product":
        logits_AV = _product(rows_SAV, blend)
    else:
        if log_weights_SA1 is None:
            logs = [math.log(weight) for _, weight in blend.weights]
            log_weights_SA1 = torch.tensor(logs, dtype=torch.float32, device=rows_SAV.device).view(-1, 1, 1)
        logits_AV = _average(rows_SAV, log_weights_SA1 - norms_SA.unsqueeze(-1))
        if blend.kind == "union":
            logits_AV = _union(rows_SAV, blend, log_weights_SA1, logits_AV)
    bad_A = ~torch.isfinite(logits_AV.amax(-1))
    logits_AV = logits_AV.masked_fill(bad_A.unsqueeze(-1), 0.0)
    return Combined(logits_AV, rows_SAV, norms_SA.masked_fill(bad_A, math.nan))


def _product(rows_SAV: torch.Tensor, blend: Blend) -> torch.Tensor:
    weights = torch.tensor([weight for _, weight in blend.weights], device=rows_SAV.device).view(-1, 1, 1)
    logits_AV = (weights * rows_SAV).sum(0)
    # With a negative weight, what must not be written would be written always.
    logits_AV = logits_AV.masked_fill((rows_SAV == -math.inf).any(0), -math.inf)
    if not blend.plausibility:
        return logits_AV
    anchor_AV = rows_SAV[blend.lanes.index(blend.anchor)]
    plausible_AV = anchor_AV >= anchor_AV.amax(-1, keepdim=True) + math.log(blend.plausibility)
    return torch.where(plausible_AV, logits_AV, anchor_AV - RULED_OUT)


def _average(rows_SAV: torch.Tensor, offsets_SA1: torch.Tensor) -> torch.Tensor:
    """log of the sum over members of exp(row + offset): a pass per member, where ``logsumexp`` over them takes five."""
    total_AV = rows_SAV[0] + offsets_SA1[0]
    for row_AV, offset_A1 in zip(rows_SAV[1:], offsets_SA1[1:], strict=True):
        total_AV = torch.logaddexp(total_AV, row_AV + offset_A1)
    return total_AV


def _union(
    rows_SAV: torch.Tensor, blend: Blend, log_weights_SA1: torch.Tensor, mixture_AV: torch.Tensor
) -> torch.Tensor:
    top_SAk = rows_SAV.topk(min(blend.top, rows_SAV.shape[-1]), dim=-1, sorted=False).indices
    # All of the union, N tokens; those that several members bring are there as often, and count once.
    ids_AN = top_SAk.transpose(0, 1).flatten(1).sort(-1).values
    again_AN = torch.nn.functional.pad(ids_AN[:, 1:] == ids_AN[:, :-1], (1, 0))
    inside_SAN = rows_SAV.gather(-1, ids_AN.expand(len(rows_SAV), -1, -1))
    norms_SA1 = torch.logsumexp(inside_SAN.masked_fill(again_AN, -math.inf), -1, keepdim=True)
    inside_AN = _average(inside_SAN, log_weights_SA1 - norms_SA1)
    return (mixture_AV - RULED_OUT).scatter_(-1, ids_AN, inside_AN)


class Place(NamedTuple):
    """A position that is sampled in a step, of a request with a blend.

    Attributes:
        row: its row in the logits.
        written: number of tokens that were written before it.
    """

    row: int
    written: int
    part: Part


def offer(
    shelf: Shelf,
    places: Sequence[Place],
    logits_RV: torch.Tensor,
    gate_RK: Callable[[], torch.Tensor | None],
) -> None:
    """Lay down what the lane says at those of ``places`` where another one writes."""
    offered = [place for place in places if place.part.blend is not None and not place.part.writes]
    if not offered:
        return
    # A copy of these rows only: the sampler works in place.
    rows_AV = logits_RV[torch.tensor([place.row for place in offered], device=logits_RV.device)]
    from_gate = [place.part.blend is not None and place.part.blend.from_gate for place in offered]
    gates = gate_RK() if any(from_gate) else None
    for place, row_V, wants in zip(offered, rows_AV.unbind(0), from_gate, strict=True):
        gate_K = gates[place.row] if gates is not None and wants else None
        shelf.put(place.part.lane, place.part.request_id, place.written, Offer(row_V, gate_K))


class Blending(NamedTuple):
    """The blended positions of a step.

    Attributes:
        logits_RV: float32, with the combinations in their rows.
        groups: positions of equal blends, and what became of them.
    """

    logits_RV: torch.Tensor
    groups: list[tuple[list[Place], Combined]]

    def support(self, tokens: Sequence[int]) -> dict[int, list[float]]:
        """By row: each member's log-probability of the row's token, see :meth:`Combined.support`."""
        found: dict[int, list[float]] = {}
        for places, combined in self.groups:
            drawn_A = torch.tensor([tokens[place.row] for place in places])
            found.update(zip((place.row for place in places), combined.support(drawn_A), strict=True))
        return found


def blended(shelf: Shelf, places: Sequence[Place], logits_RV: torch.Tensor) -> Blending | None:
    """Replace the logits where the lane writes a blend; None where there is none. Float32 logits are changed in place.

    A member that has laid nothing down counts as one whose logits are not finite.
    """
    by_blend: dict[Blend, list[Place]] = {}
    for place in places:
        if place.part.writes and place.part.blend is not None:
            by_blend.setdefault(place.part.blend, []).append(place)
    if not by_blend:
        return None
    # What is less precise would keep three digits of a log-probability. The sampler computes in float32 anyway.
    logits_RV = logits_RV.float()
    groups = []
    for blend, found in by_blend.items():
        rows_A = torch.tensor([place.row for place in found], device=logits_RV.device)
        own_AV = logits_RV[rows_A]
        combined = _combined(shelf, blend, found, own_AV)
        logits_RV[rows_A] = combined.logits_AV
        groups.append((found, combined))
    return Blending(logits_RV, groups)


def _combined(shelf: Shelf, blend: Blend, places: list[Place], own_AV: torch.Tensor) -> Combined:
    width = own_AV.shape[-1]
    rows = []
    for lane in blend.lanes[:-1]:
        offers = [shelf.get(lane, place.part.request_id, place.written) for place in places]
        nothing_V = torch.full((1,), math.nan, device=own_AV.device).expand(width)
        # Members may pad their outputs to different widths; there is nothing to write in the padding.
        rows.append(torch.stack([_fitted(given.row, own_AV) if given else nothing_V for given in offers]))
    rows_SAV = torch.stack([*rows, own_AV])
    log_weights_SA1 = None
    if blend.from_gate:
        gates = [shelf.get(0, place.part.request_id, place.written) for place in places]
        log_weights_SA1 = _gate_weights(blend, [given.gate if given else None for given in gates], own_AV.device)
    return combine(rows_SAV, blend, log_weights_SA1)


def _fitted(row: torch.Tensor, like_AV: torch.Tensor) -> torch.Tensor:
    width = like_AV.shape[-1]
    if row.shape[-1] != width:
        row = torch.nn.functional.pad(row[:width], (0, max(0, width - len(row))), value=-math.inf)
    return row if row.dtype == like_AV.dtype and row.device == like_AV.device else row.to(like_AV)


def _gate_weights(blend: Blend, gates: list[torch.Tensor | None], device: torch.device) -> torch.Tensor:
    """[S, A, 1]: log P(Z = k) of the members; NaN where the gate has said nothing finite."""
    experts = [lane - 1 for lane in blend.lanes[1:]]
    nothing = torch.full((len(experts),), math.nan, device=device)
    values_AK = torch.stack([nothing if gate is None else gate.float().to(device)[experts] for gate in gates])
    scores_AS = torch.nn.functional.pad(values_AK, (1, 0))
    return torch.log_softmax(scores_AS, -1).T.unsqueeze(-1)
