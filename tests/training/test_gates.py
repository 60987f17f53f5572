"""Gates that learn on cached inputs: whatever the scale of the hidden states, of each kind, and at what cost."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from engine.gate import GateArtifact
from engine.gates import FEATURES
from tests.training.builders import TinyProject
from training import settings as training_settings
from training.__main__ import main
from training.errors import SettingsError
from training.fit import Plan
from training.gate_only import Gate, GateFit, Ranking, Scaling, fit_gate, new_gate, ranking
from training.losses import Loss, Tokens, marginal, priced, weak
from training.scoring import ModelScores, PairScores
from training.settings import GateSettings, load_settings
from training.stages import train

CPU = torch.device("cpu")


def made_up(count: int = 400, scale: float = 1.0, experts: int = 1, seed: int = 0) -> PairScores:
    """Where the first input is positive only the first expert is right, else the base; the scale hides it."""
    torch.manual_seed(seed)
    hidden = torch.randn(count, 6) * torch.tensor([1.0, 0.1, 10.0, 1.0, 3.0, 1.0]) + torch.tensor([0.0, 5, 0, -2, 0, 1])
    needed = hidden[:, 0] > 0
    good, bad = torch.tensor(-0.1), torch.tensor(-6.0)
    gold = torch.ones(count, dtype=torch.long)
    features = torch.randn(count, len(FEATURES))
    base = ModelScores(torch.where(needed, bad, good), torch.where(needed, 0, 1), hidden * scale, features)
    right = ModelScores(torch.where(needed, good, bad), torch.where(needed, 1, 0), None)
    wrong = ModelScores(torch.full((count,), -6.0), torch.zeros(count, dtype=torch.long), None)
    return PairScores(gold, [0, count], base, (right, *[wrong] * (experts - 1)))


def fitted(
    scores: PairScores, folder: Path, settings: GateSettings, loss: Loss = weak, *, bias: bool = True, steps: int = 200
) -> Gate:
    fitting = GateFit(1e-2, 1e-2, 10_000, Plan(steps, 0.04, 1000), 1.0, bias, 0, standardise=True)
    experts = len(scores.experts)
    start = new_gate(settings, scores.base, experts, 0, bias=bias)
    return fit_gate(scores, start, loss, fitting, folder, "fit", CPU)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_gate_is_the_same_whatever_the_scale_of_the_hidden_states(tmp_path: Path, kind: str, bias: bool) -> None:
    settings = GateSettings.model_validate({"kind": kind, "width": 8})
    found = []
    for scale in (1.0, 1000.0):
        scores = made_up(scale=scale)
        gate = fitted(scores, tmp_path / f"{scale}", settings, bias=bias)
        assert kind == "mlp" or bool(gate.bias_K.any()) == bias
        found.append(gate.log_odds(scores.hidden_ND))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


def test_scaling_folds_into_the_gate() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(50, 6) * 30 + 7
    scores = ModelScores(torch.zeros(50), torch.zeros(50), inputs)
    scaling = Scaling.of(scores, (), centred=True)
    scaled = (inputs - scaling.mean_I) / scaling.scale_I
    torch.testing.assert_close(scaled.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    assert float(scaled.square().sum(1).mean()) == pytest.approx(1.0, rel=1e-4)
    for kind, width in (("linear", 1), ("mlp", 4)):
        gate = new_gate(GateSettings.model_validate({"kind": kind, "width": width}), scores, 2, 0, bias=True)
        gate.theta_KD.normal_()
        inner = Gate.from_tensors(scaling.into(gate), gate)
        torch.testing.assert_close(inner.logits(scaled), gate.logits(inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "features"), [("linear", ()), ("mlp", ()), ("mlp", ("entropy", "margin"))])
def test_each_kind_learns_which_expert_is_needed(tmp_path: Path, kind: str, features: tuple[str, ...]) -> None:
    settings = GateSettings.model_validate({"kind": kind, "width": 16, "features": features})
    scores = made_up(experts=2)
    gate = fitted(scores, tmp_path, settings, steps=400)
    found = ranking(gate, made_up(experts=2, seed=1))
    assert found.auroc is not None
    assert found.auroc > 0.95
    # All right where the better half is deferred, and on the way there and away from it a half less: 3/4.
    assert found.accuracy == pytest.approx(0.75, abs=0.03)


def test_an_mlp_learns_what_a_vector_cannot(tmp_path: Path) -> None:
    """Needed where the distance from the middle is great."""

    def ring(seed: int) -> PairScores:
        scores = made_up(1000, seed=seed)
        hidden = scores.hidden_ND
        needed = hidden[:, 0].abs() > 0.7
        base = ModelScores(scores.base.logp_N, torch.where(needed, 0, 1), hidden)
        return PairScores(
            scores.gold_N, scores.starts, base, (ModelScores(-needed.float(), torch.where(needed, 1, 0), None),)
        )

    found = {}
    for kind in ("linear", "mlp"):
        settings = GateSettings.model_validate({"kind": kind, "width": 32})
        found[kind] = ranking(fitted(ring(0), tmp_path / kind, settings, steps=600), ring(1)).auroc
    assert found["linear"] is not None
    assert found["mlp"] is not None
    assert found["linear"] < 0.65 < 0.9 < found["mlp"]


def test_ranking_by_hand() -> None:
    """Tokens in the gate's order: the expert gains one, loses one, changes nothing; so right are 2, 3, 2, 2 of 3.

    One of three is needed, so what happens beyond a rate of 2/3 does not count.
    """
    gold = torch.ones(3, dtype=torch.long)
    base = ModelScores(torch.zeros(3), torch.tensor([0, 1, 1]), torch.tensor([[3.0], [2.0], [1.0]]))
    expert = ModelScores(torch.zeros(3), torch.tensor([1, 0, 1]), None)
    found = ranking(Gate(torch.ones(1, 1), torch.zeros(1)), PairScores(gold, [0, 3], base, (expert,)))
    assert found.rates == pytest.approx(2 / 3)
    assert found.accuracy == pytest.approx((2 + 3 + 2) / 3 / 3)
    assert found.auroc == 1.0


def test_the_ranking_counts_what_is_deferred_first() -> None:
    """Two of ten tokens are needed, and the expert spoils four. One gate finds the needed ones first and then the
    spoilt ones, the other the harmless ones first: better on average over all rates, worse where anybody serves."""
    gold = torch.ones(10, dtype=torch.long)
    base_top = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, 1, 1])
    expert_top = torch.tensor([1, 1, 0, 0, 0, 0, 1, 1, 1, 1])
    first, second = torch.tensor([[9, 8, 7, 6, 5, 4, 3, 2, 1, 0], [5, 4, 3, 2, 1, 0, 9, 8, 7, 6]]).float()
    hidden = torch.stack([first, second], dim=1)
    base = ModelScores(torch.zeros(10), base_top, hidden)
    scores = PairScores(gold, [0, 10], base, (ModelScores(torch.zeros(10), expert_top, None),))
    found = [ranking(Gate(theta[None], torch.zeros(1)), scores) for theta in torch.eye(2)]
    assert found[0].rates == 0.4
    assert found[0].accuracy > found[1].accuracy
    assert found[0].accuracy == pytest.approx((8 + 9 + 10 + 9 + 8) / 50)


def test_log_odds_do_not_saturate_and_engine_and_training_agree() -> None:
    gate = Gate(torch.tensor([[1.0], [0.5]]), torch.zeros(2))
    inputs = torch.tensor([[30.0], [31.0], [-38.0]])
    log_odds = gate.log_odds(inputs)
    assert log_odds[1] > log_odds[0] + 0.9
    expected = [math.log(math.exp(x) + math.exp(x / 2)) for x in (30.0, 31.0, -38.0)]
    assert log_odds.tolist() == pytest.approx(expected, rel=1e-5)
    assert gate.deferral(inputs).tolist() == pytest.approx([1 / (1 + math.exp(-x)) for x in expected])


def test_a_cost_of_deferral_by_hand_and_by_differences() -> None:
    torch.manual_seed(0)
    gate = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    base, expert = -torch.rand(5, dtype=torch.float64), -torch.rand(5, 2, dtype=torch.float64)
    label = torch.zeros(5, dtype=torch.long)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return priced(marginal, 2.0)(Tokens(logits, base, expert, label), 1.0)

    tokens = Tokens(gate, base, expert, label)
    deferral = (gate.exp().sum(1) / (1 + gate.exp().sum(1))).mean()
    assert float(loss(gate).detach()) == pytest.approx(float((marginal(tokens) + 2 * deferral).detach()))
    assert torch.autograd.gradcheck(loss, (gate,))
    assert priced(marginal, 0.0) is marginal


def test_a_cost_of_deferral_lowers_the_rate(tmp_path: Path) -> None:
    """An expert that is always a little surer than a base that is right as well."""
    scores = made_up()
    expert = ModelScores(scores.base.logp_N + 0.05, scores.base.top_N, None)
    scores = PairScores(scores.gold_N, scores.starts, scores.base, (expert,))
    rates = [
        float(
            fitted(scores, tmp_path / str(cost), GateSettings(), priced(marginal, cost))
            .deferral(scores.hidden_ND)
            .mean()
        )
        for cost in (0.0, 1.0)
    ]
    assert rates[1] < 0.3 < 0.6 < rates[0]


def test_the_initial_gate_is_kept_where_training_does_not_better_it(
    tiny: TinyProject, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for better, kept in ((0.1, "trained"), (-0.1, "start"), (0.0, "start")):
        tiny.content["out"] = str(tiny.folder / kept / str(better))
        given = iter([ranking_of(0.5), ranking_of(0.5 + better)])
        monkeypatch.setattr(train, "ranking", lambda *_, given=given: next(given))
        run = train.train_run(tiny.project, "collm", 0)
        results = json.loads((run / "done.json").read_text())
        assert results["kept"] == kept
        gate = GateArtifact.load(run / "gate")
        initial = train.init.initial_gate(tiny.project, 0)
        assert torch.equal(gate.theta, initial.theta_KD) == (kept == "start")
        assert ("the initial gate is kept" in capsys.readouterr().out) == (kept == "start")
        assert gate.training is not None
        assert gate.training["kept"] == kept


def ranking_of(accuracy: float) -> Ranking:
    return Ranking(accuracy, None)


def test_a_pipeline_with_an_mlp_and_features(tmp_path: Path) -> None:
    tiny = TinyProject.make(tmp_path, experts=2)
    tiny.content["gate"] = {"kind": "mlp", "width": 4, "features": ["margin", "logprob_1"]}
    assert main(["pipeline", "--config", str(tiny.write())]) == 0
    gate = GateArtifact.load(tmp_path / "out" / "pair" / "gate")
    assert (gate.kind, gate.features, gate.hidden_size) == ("mlp", ("margin", "logprob_1"), 16)
    assert gate.theta.shape == (2, 4)


def test_features_known_to_the_settings_are_the_engines() -> None:
    assert training_settings.FEATURES == FEATURES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": {"features": ["mood"]}}, "gate.features: 'mood' is there twice, or is none of entropy"),
        ({"gate": {"kind": "mlp"}, "train": {"mode": "joint"}}, "need train.mode = 'gate'"),
        ({"gate": {"kind": "mlp", "standardise": False}}, "need gate.standardise = true"),
    ],
)
def test_settings_that_cannot_be(tiny: TinyProject, changes: dict[str, dict[str, object]], message: str) -> None:
    for section, content in changes.items():
        tiny.content.setdefault(section, {}).update(content)
    with pytest.raises(SettingsError, match=message):
        load_settings(tiny.write())
