"""Regret: which tokens it learns from, and what it learns."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoints import ModelIdentity
from engine.gates import FEATURES
from engine.hindsight import Hindsight
from engine.regret import RegretArtifact
from engine.types import Completion, Look
from tests.training.builders import TinyProject
from training.errors import SettingsError
from training.gate_only import Gate
from training.regret import Disputes, Positions, chance, fit_regret, regret_loss, value
from training.scoring import ModelScores, PairScores
from training.settings import RegretSettings, load_settings
from training.stages.regret import read_of

CPU = torch.device("cpu")
AHEAD = 3


# -- which tokens -----------------------------------------------------------------------------------------------


def test_disputed_are_deferred_tokens_at_which_the_models_differ() -> None:
    """By the expert that the gate prefers, and regretted where the base has the gold token."""
    gold_N = torch.tensor([1, 1, 1, 1, 1, 1])
    nothing_N = torch.zeros(6)
    hidden_ND = torch.tensor([[2.0, 0], [2, 0], [2, 0], [-2, -2], [0, 2], [2, 0]])
    base = ModelScores(nothing_N, torch.tensor([1, 0, 7, 1, 1, 1]), hidden_ND)
    first = ModelScores(nothing_N, torch.tensor([9, 1, 8, 9, 1, 9]), None)
    second = ModelScores(nothing_N, torch.tensor([1, 0, 7, 9, 9, 9]), None)
    scores = PairScores(gold_N, [0, 5, 6], base, (first, second))
    gate = Gate(torch.eye(2), torch.zeros(2))
    found = Disputes.of(scores, gate, 0.5, torch.tensor([True] * 5 + [False]))
    # The fourth is not deferred; the sixth is not asked.
    assert found.row_P.tolist() == [0, 1, 2, 4]
    # Where the expert is right, and where both are wrong, nothing is regretted.
    assert found.regretted_P.tolist() == [True, False, False, True]
    assert len(Disputes.of(scores, gate, 1.0, torch.ones(6, dtype=torch.bool)).row_P) == 0


@pytest.mark.parametrize(("regretted", "kept"), [(30, 20), (6, 6), (95, 35), (0, 0), (100, 40)])
def test_of_too_many_the_rarer_outcome_is_kept_and_the_mean_stays(regretted: int, kept: int) -> None:
    regretted_P = torch.zeros(100, dtype=torch.bool)
    regretted_P[torch.randperm(100, generator=torch.Generator().manual_seed(0))[:regretted]] = True
    some = Disputes(torch.arange(100) + 7, regretted_P, torch.ones(100)).some(40)
    assert len(some.row_P) == 40
    assert some.row_P.tolist() == sorted(set(some.row_P.tolist()))
    assert torch.equal(some.regretted_P, regretted_P[some.row_P - 7])
    assert int(some.regretted_P.sum()) == kept
    assert float(some.weight_P.sum()) == pytest.approx(100)
    assert float(some.weight_P[some.regretted_P].sum()) == pytest.approx(regretted)
    assert some.some(40) is some


def look(base: float, expert: float | None = None, *, agreed: bool | None = None) -> Look:
    return Look(base, expert, agreed)


@pytest.mark.parametrize(
    ("tokens", "reason", "left", "read", "behind"),
    [
        ([5, 6, 7], "length", 9, [5, 6, 7], 0.7),
        # The text ends before so much is read: its last token is read by nobody.
        ([5, 6, 0], "stop", 9, [5, 6], 0.7),
        ([5, 0], "stop", 9, [5], 1.0),
        ([0], "stop", 9, [], 1.0),
        ([5, 6, 7], "length", 3, [5, 6], 0.7),
    ],
)
def test_what_is_read_behind_a_disputed_token(
    tokens: list[int], reason: Any, left: int, read: list[int], behind: float
) -> None:
    looks = [look(0.4, 0.9, agreed=False), look(0.8, 0.7, agreed=True), look(0.6)][: len(tokens)]
    completion = Completion("0", tokens, [1, 1, 0][: len(tokens)], [], reason, looks=looks)
    assert read_of(completion, AHEAD, left) == (read, [0.4, 0.9, behind])


def test_what_the_serving_pair_does_not_dispute_is_left_out() -> None:
    for source, agreed in ((0, None), (1, True)):
        completion = Completion("0", [5], [source], [], "length", looks=[look(0.4, 0.9, agreed=agreed)])
        assert read_of(completion, 1, 9) is None


# -- what is learned --------------------------------------------------------------------------------------------


def made_up(count: int, scale: float = 1.0, seed: int = 0) -> Positions:
    """Regretted where the first input and the last number together are great."""
    drawn = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 5, generator=drawn)
    numbers = torch.randn(count, 4, generator=drawn)
    regretted = inputs[:, 0] + numbers[:, 3] > 0
    features = torch.randn(count, len(FEATURES), generator=drawn)
    hidden = (inputs * torch.tensor([1.0, 5, 1, 0.1, 1]) + 3) * scale
    scores = ModelScores(torch.zeros(count), torch.zeros(count), hidden, features)
    return Positions(scores, 4 * numbers + 2, regretted, torch.ones(count))


def accuracy(found: torch.Tensor, positions: Positions) -> float:
    return float(((found > 0) == positions.regretted_P).float().mean())


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("features", [(), ("margin", "entropy")])
def test_both_parts_are_learned_whatever_their_scale(tmp_path: Path, kind: str, features: tuple[str, ...]) -> None:
    settings = RegretSettings.model_validate(
        {
            "ahead": AHEAD,
            "kind": kind,
            "width": 8,
            "features": features,
            "steps": 300,
            "learning_rate": 3e-2,
            "starts": 1,
        }
    )
    found = []
    for scale in (1.0, 1000.0):
        held_out = made_up(300, scale, seed=1)
        regret = fit_regret(made_up(600, scale), held_out, settings, 0, tmp_path, CPU)
        found.append(regret.values(held_out))
        assert accuracy(found[-1], held_out) > 0.9
        assert regret.loss < 0.5 * chance(held_out)
        auroc = regret.auroc(held_out)
        assert auroc is not None
        assert auroc > 0.98
    torch.testing.assert_close(found[0], found[1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_what_is_served_is_what_was_learned(tmp_path: Path, kind: str) -> None:
    settings = RegretSettings.model_validate({"ahead": AHEAD, "kind": kind, "width": 8, "starts": 1, "steps": 40})
    learned, held_out = made_up(200), made_up(50, seed=1)
    regret = fit_regret(learned, held_out, settings, 0, tmp_path, CPU)
    RegretArtifact(
        theta=regret.gate.theta_KD, bias=regret.gate.bias_K, numbers=regret.numbers_N, ahead=AHEAD,
        base=ModelIdentity("a" * 64, "b" * 64, {}, 1), default_threshold=0.5, kind=kind, layers=regret.gate.layers,
    ).save(tmp_path)  # fmt: skip
    served = RegretArtifact.load(tmp_path)
    assert held_out.scores.hidden_ND is not None
    logits = served.function(held_out.scores.hidden_ND)[:, 0].tolist()
    hindsight = Hindsight(AHEAD, tuple(served.numbers.tolist()), 0.5)
    found = [hindsight.regret(*each) for each in zip(logits, held_out.numbers_PN.tolist(), strict=True)]
    assert found == pytest.approx(regret.values(held_out).sigmoid().tolist(), abs=1e-5)
    mean = torch.nn.functional.binary_cross_entropy(torch.tensor(found), held_out.regretted_P.float())
    assert regret.loss == pytest.approx(float(mean), abs=1e-4)


def test_the_step_with_the_least_loss_on_held_out_positions_is_kept(tmp_path: Path) -> None:
    learned, held_out = made_up(200), made_up(50, seed=1)
    opposite = Positions(held_out.scores, held_out.numbers_PN, ~held_out.regretted_P, held_out.weight_P)
    settings = RegretSettings(ahead=AHEAD, steps=50)
    regret = fit_regret(learned, opposite, settings, 0, tmp_path, CPU)
    # Nothing that is learned betters what it begins with: one half for all.
    assert regret.loss == pytest.approx(math.log(2), abs=1e-3)
    assert torch.equal(regret.numbers_N, torch.zeros(4))


def test_positions_count_by_their_weight(tmp_path: Path) -> None:
    """Two thirds of those that are there are regretted, and of those that they stand for a fifth."""
    learned = made_up(300)
    regretted_P = torch.arange(300) % 3 > 0
    weight_P = torch.where(regretted_P, 0.5, 4.0)
    positions = Positions(learned.scores, torch.zeros(300, 4), regretted_P, weight_P)
    share = 100 / 500
    assert chance(positions) == pytest.approx(-share * math.log(share) - (1 - share) * math.log(1 - share))
    settings = RegretSettings(ahead=AHEAD, kind="linear", weight_decay=0.0)
    regret = fit_regret(positions, positions, settings, 0, tmp_path, CPU)
    assert float(regret.values(positions).sigmoid().mean()) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_the_gradient_of_the_loss_against_finite_differences(kind: str) -> None:
    drawn = torch.Generator().manual_seed(0)
    shapes = {"theta": (1, 3), "bias": (1,), "hidden_weight": (3, 5), "hidden_bias": (3,), "numbers": (4,)}
    if kind == "linear":
        shapes = {"theta": (1, 5), "bias": (1,), "numbers": (4,)}
    tensors = [torch.randn(shape, generator=drawn).double().requires_grad_() for shape in shapes.values()]
    inputs_PI, numbers_PN = torch.randn(6, 5, generator=drawn).double(), torch.randn(6, 4, generator=drawn).double()
    regretted_P, weight_P = torch.tensor([True, False] * 3), torch.rand(6, generator=drawn).double()

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        value_P = value(kind, dict(zip(shapes, tensors, strict=True)), inputs_PI, numbers_PN)
        return regret_loss(value_P, regretted_P, weight_P)

    assert torch.autograd.gradcheck(loss, tensors)
    probability_P = value(kind, dict(zip(shapes, tensors, strict=True)), inputs_PI, numbers_PN).sigmoid()
    likelihood_P = torch.where(regretted_P, probability_P, 1 - probability_P)
    torch.testing.assert_close(loss(*tensors), -(weight_P * likelihood_P.log()).sum())


def test_wrong_settings_are_refused(tiny: TinyProject) -> None:
    for key, wrong, said in (
        ("ahead", 17, "less than or equal to 16"),
        ("thresholds", [], "at least one"),
        ("thresholds", [0.5, 1.0], "from 0 to below 1"),
        ("features", ["margin", "margin"], "'margin' is there twice"),
    ):
        tiny.content["regret"] = {key: wrong}
        with pytest.raises(SettingsError, match=said):
            load_settings(tiny.write())
