"""The tensor operations of blends, by hand and on rows that no model should give. No engine here."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.blends import Blend
from engine.lanes.interface import Part
from engine.lanes.shelf import Offer, Shelf
from engine.vllm_hooks.blend import RULED_OUT, Place, blended, combine, offer
from tests.oracle import blend_loop

INF = math.inf


def rows(members: int = 3, positions: int = 2, width: int = 12) -> torch.Tensor:
    return torch.randn(members, positions, width, generator=torch.Generator().manual_seed(3)) * 3


@pytest.mark.parametrize(
    "loop",
    [
        blend_loop.Blend("mixture", ((0, 0.2), (1, 0.3), (2, 0.5))),
        blend_loop.Blend("product", ((0, 1.0), (1, 0.5), (2, -0.5))),
        blend_loop.Blend("product", ((0, -0.5), (1, 0.1), (2, 1.4)), anchor=2, plausibility=0.2),
        blend_loop.Blend("union", ((0, 0.2), (1, 0.3), (2, 0.5)), top=2),
    ],
    ids=str,
)
def test_as_defined(loop: blend_loop.Blend) -> None:
    given = rows()
    assert loop.weights != "gate"
    blend = Blend(loop.kind, loop.weights, anchor=loop.anchor, plausibility=loop.plausibility, top=loop.top or 10)
    combined = combine(given, blend)
    for position in range(2):
        wanted = blend_loop.combine(loop, dict(enumerate(given[:, position])), dict(loop.weights))
        got = combined.logits_AV[position].double()
        assert torch.allclose(got.softmax(-1), wanted.softmax(-1), atol=1e-6)
        assert float(got.softmax(-1).sum()) == pytest.approx(1)
    tokens = torch.tensor([4, 7])
    support = combined.support(tokens)
    wanted_support = given.log_softmax(-1)
    for position, token in enumerate(tokens.tolist()):
        assert support[position] == pytest.approx(wanted_support[:, position, token].tolist(), abs=1e-6)


def test_what_must_not_be_written_is_not_written() -> None:
    """A negative weight would make the most probable token of what is masked."""
    given = rows()
    given[:, :, 9:] = -INF
    for blend in (
        Blend("product", ((0, 1.0), (1, 1.0), (2, -1.0))),
        Blend("product", ((0, -0.5), (1, 0.5), (2, 1.0)), anchor=2, plausibility=0.5),
        Blend("mixture", ((0, 0.2), (1, 0.3), (2, 0.5))),
        Blend("union", ((0, 0.2), (1, 0.3), (2, 0.5)), top=11),
    ):
        combined = combine(given, blend)
        assert (combined.logits_AV[:, 9:] == -INF).all(), blend
        assert torch.isfinite(combined.logits_AV[:, :9]).all(), blend


def test_what_one_member_must_not_write_no_product_writes() -> None:
    """Whatever its weight is: a negative one would make it infinitely probable, and its position no distribution."""
    given = rows()
    given[2, :, 9:] = -INF
    for weight in (-1.0, 1.0):
        combined = combine(given, Blend("product", ((0, 1.0), (1, 1.0), (2, weight))))
        assert (combined.logits_AV[:, 9:] == -INF).all()
        assert torch.isfinite(combined.logits_AV[:, :9]).all()
        assert torch.isfinite(combined.norms_SA).all()


def test_what_is_ruled_out_keeps_its_order() -> None:
    """For a grammar that leaves nothing else."""
    given = rows()
    union = combine(given, Blend("union", ((0, 0.2), (1, 0.3), (2, 0.5)), top=1)).logits_AV
    mixture = combine(given, Blend("mixture", ((0, 0.2), (1, 0.3), (2, 0.5)))).logits_AV
    outside = union < -RULED_OUT / 2
    assert outside.any()
    assert torch.equal(union[outside].argsort(), mixture[outside].argsort())
    masked = combine(given, Blend("product", ((0, -0.5), (1, 1.5), (2, 0.0)), anchor=1, plausibility=1.0)).logits_AV
    for position in range(2):
        order = masked[position].argsort(descending=True)
        assert order.tolist() == given[1, position].argsort(descending=True).tolist()


@pytest.mark.parametrize("value", [math.nan, INF])
@pytest.mark.parametrize("kind", ["mixture", "product", "union"])
def test_a_broken_member_breaks_its_own_position_alone(kind: str, value: float) -> None:
    given = rows()
    good = combine(given, Blend(kind, ((0, 0.2), (1, 0.3), (2, 0.5)))).logits_AV  # type: ignore[arg-type]
    given[1, 0, 3] = value
    combined = combine(given, Blend(kind, ((0, 0.2), (1, 0.3), (2, 0.5))))  # type: ignore[arg-type]
    assert torch.equal(combined.logits_AV[1], good[1])
    assert torch.isfinite(combined.logits_AV).all(), "what the sampler gets is a distribution"
    bad, fine = combined.support(torch.tensor([1, 1]))
    assert all(map(math.isnan, bad))
    assert all(map(math.isfinite, fine))


def test_nothing_that_can_be_written() -> None:
    given = torch.full((2, 1, 4), -INF)
    combined = combine(given, Blend("mixture", ((0, 0.5), (1, 0.5))))
    assert all(map(math.isnan, combined.support(torch.tensor([0]))[0]))


def place(lane: int, blend: Blend, row: int = 0, written: int = 5) -> Place:
    return Place(row, written, Part(lane, "a", blend))


def test_over_the_shelf() -> None:
    """Members of other widths, whose padding is masked, in another type, by the gate's weights."""
    blend = Blend("mixture", ((0, 1.0), (1, 1.0)), from_gate=True)
    shelf = Shelf()
    base, expert = rows(2, 1, 8)[0].to(torch.bfloat16), rows(2, 1, 6)[1]
    base[:, 6:] = -INF
    before = base.clone()
    offer(shelf, [place(0, blend)], base, lambda: torch.tensor([[0.7]]))
    base.zero_()  # as a sampler that works in place does
    done = blended(shelf, [place(1, blend)], expert.clone())
    assert done is not None
    share = 1 / (1 + math.exp(-0.7))
    wanted = (1 - share) * before.float().softmax(-1)[:, :6] + share * expert.softmax(-1)
    assert torch.allclose(done.logits_RV.softmax(-1), wanted / wanted.sum(), atol=1e-6)
    assert list(done.support([2])) == [0]


def test_nothing_on_the_shelf() -> None:
    blend = Blend("product", ((0, 1.0), (1, 1.0)))
    done = blended(Shelf(), [place(1, blend)], rows(1, 1)[0])
    assert done is not None
    assert all(map(math.isnan, done.support([2])[0]))
    lost_gate = Blend("mixture", ((0, 1.0), (1, 1.0)), from_gate=True)
    shelf = Shelf()
    shelf.put(0, "a", 5, Offer(rows(1, 1)[0, 0], torch.tensor([math.nan])))
    done = blended(shelf, [place(1, lost_gate)], rows(1, 1)[0])
    assert done is not None
    assert all(map(math.isnan, done.support([2])[0]))


def test_rows_without_a_blend_are_left_alone() -> None:
    blend = Blend("mixture", ((0, 0.5), (1, 0.5)))
    given = rows(1, 3)[0]
    assert blended(Shelf(), [place(0, blend)], given) is None
    shelf = Shelf()
    shelf.put(0, "a", 5, Offer(given[0].clone()))
    before = given.clone()
    done = blended(shelf, [place(1, blend, row=1)], given)
    assert done is not None
    assert torch.equal(done.logits_RV[[0, 2]], before[[0, 2]])
    assert not torch.equal(done.logits_RV[1], before[1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # vLLM's, while it is imported
@pytest.mark.parametrize(("shards", "writes", "waits"), [(2, True, True), (1, True, False), (2, False, False)])
def test_shards_wait_until_all_have_read(
    shards: int, writes: bool, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one's answer lets the engine empty the shelf, and a later one would draw another token by itself."""
    from engine.vllm_hooks import worker

    happened: list[str] = []

    class Watched(Shelf):
        def get(self, *arguments: Any) -> Offer | None:
            happened.append("read")
            return super().get(*arguments)

    shelf = Watched()
    shelf.put(0, "a", 0, Offer(torch.zeros(4)))
    part = Part(1 if writes else 0, "a", Blend("mixture", ((0, 0.5), (1, 0.5))))
    monkeypatch.setattr(worker, "get_tensor_model_parallel_rank", lambda: 1)
    monkeypatch.setattr(worker, "get_tensor_model_parallel_world_size", lambda: shards)
    monkeypatch.setattr(worker, "get_tp_group", lambda: SimpleNamespace(barrier=lambda: happened.append("wait")))
    lane: Any = SimpleNamespace(collm_masses=None, collm_shelf=shelf)
    worker.LaneWorker._collm_blend(lane, [Place(0, 0, part)], torch.zeros(1, 4), lambda: None)
    assert happened == ["read"] * writes + ["wait"] * waits
