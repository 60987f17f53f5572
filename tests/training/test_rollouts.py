"""Gates that learn from the answers that they draw: the gradient against finite differences, and the whole stage."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from engine.gate import GateArtifact
from tests.training.builders import TinyProject
from training import graph
from training.__main__ import main
from training.fit import Plan
from training.gate_only import Gate, new_gate, scaling_of
from training.rollouts import Rollouts, RoundFit, advantages, drawing, fit_round, log_drawn, policy_loss
from training.scoring import ModelScores
from training.settings import GateSettings


def test_an_answer_is_held_against_the_others_to_its_question() -> None:
    found = advantages(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))
    torch.testing.assert_close(found, torch.tensor([[1.0, -0.5, -0.5], [0.0, 0.0, 0.0]]))


def reward(lanes: tuple[int, ...]) -> float:
    """Of answers of two tokens: what the first decision is worth depends on the second."""
    return {(1, 0): 1.0, (1, 2): 0.3, (0, 1): 0.5}.get(lanes, 0.0) - 0.1 * sum(lane > 0 for lane in lanes)


def expected(theta_KD: torch.Tensor, inputs_ND: torch.Tensor) -> torch.Tensor:
    """The mean reward over all pairs of decisions."""
    gate_NK = inputs_ND @ theta_KD.T
    pairs = itertools.product(range(3), repeat=2)
    return sum((log_drawn(gate_NK, torch.tensor(p)).sum().exp() * reward(p) for p in pairs), torch.zeros(()).double())


def test_the_gradient_is_that_of_the_expected_reward() -> None:
    """Over all answers, each as often as it is drawn; the expected reward's own gradient by finite differences."""
    torch.manual_seed(0)
    inputs_ND, theta_KD = torch.randn(2, 3).double(), torch.randn(2, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda theta: expected(theta, inputs_ND), (theta_KD,))
    loss = torch.zeros(()).double()
    for pair in itertools.product(range(3), repeat=2):
        logp_N = log_drawn(inputs_ND @ theta_KD.T, torch.tensor(pair))
        often = logp_N.sum().exp().detach()
        # Any number may be taken off all rewards, as the others' mean is.
        advantage_N = torch.full((2,), reward(pair) - 0.2).double()
        loss = loss + often * policy_loss(logp_N, logp_N.detach(), advantage_N, 0.2)
    (found,) = torch.autograd.grad(loss, theta_KD)
    (exact,) = torch.autograd.grad(expected(theta_KD, inputs_ND), theta_KD)
    torch.testing.assert_close(found, -exact)


def test_the_loss_against_finite_differences_and_beyond_the_clip() -> None:
    torch.manual_seed(1)
    gate_NK = torch.randn(6, 2).double().requires_grad_()
    lane_N, advantage_N = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, 0.0]).double()
    drawn_logp_N = log_drawn(gate_NK.detach(), lane_N) + 0.05
    assert torch.autograd.gradcheck(
        lambda gate: policy_loss(log_drawn(gate, lane_N), drawn_logp_N, advantage_N, 0.2), (gate_NK,)
    )
    # More probable than the clip allows: nothing more to gain, but what was worse can still be made good.
    logp_N = torch.tensor([math.log(0.5)] * 2, requires_grad=True)
    policy_loss(logp_N, torch.tensor([math.log(0.3)] * 2), torch.tensor([1.0, -1.0]), 0.2).backward()  # type: ignore[no-untyped-call]
    assert logp_N.grad is not None
    assert float(logp_N.grad[0]) == 0.0
    assert float(logp_N.grad[1]) == pytest.approx(5 / 3)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_drawing_gate_decides_as_by_the_threshold(kind: str) -> None:
    torch.manual_seed(2)
    inputs_NI = torch.randn(50, 4)
    scores = ModelScores(torch.zeros(50), torch.zeros(50), inputs_NI)
    gate = new_gate(GateSettings.model_validate({"kind": kind, "width": 3}), scores, 2, 0, bias=True)
    gate.theta_KD.normal_()
    torch.testing.assert_close(drawing(gate, 0.7).log_odds(inputs_NI), gate.log_odds(inputs_NI) - 0.7)


def test_a_gate_learns_what_its_decisions_lead_to(tmp_path: Path) -> None:
    """Deferring at the first input spoils the answer, whatever is decided at the second; there it saves it."""
    torch.manual_seed(3)
    first, second = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    scores = ModelScores(torch.zeros(20), torch.zeros(20), torch.stack([first, second] * 10) + 0.1 * torch.randn(20, 3))
    gate = new_gate(GateSettings(), scores, 1, 0, bias=True)
    for number in range(5):
        lane_QG2 = torch.rand(40, 4, 2) < gate.deferral(torch.stack([first, second]))
        reward_QG = (~lane_QG2[:, :, 0] & lane_QG2[:, :, 1]).float()
        rollouts = Rollouts(
            torch.stack([first, second] * 160), lane_QG2.long().flatten(), list(range(0, 321, 2)),
            advantages(reward_QG).flatten(),
        )  # fmt: skip
        settings = RoundFit(0.1, 0.2, 40, Plan(16, 0.0, 100), number)
        gate = fit_round(gate, rollouts, scaling_of(gate, scores, bias=True), settings, tmp_path / f"{number}", "fit")
    deferred = gate.deferral(torch.stack([first, second]))
    assert float(deferred[0]) < 0.2
    assert float(deferred[1]) > 0.8


def test_the_stage_is_off_and_when_it_is_on_its_gate_is_calibrated(
    tiny: TinyProject, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ["--config", str(tiny.write())]
    assert main(["train", *config]) == 0
    out = tiny.folder / "out"
    assert main(["rollouts", *config]) == 0
    assert not (out / "rollouts").exists()
    tiny.content["rollouts"] = {"rounds": 2, "questions": 5, "samples": 2, "steps": 3, "answers": 4}
    assert main(["calibrate", *config, "--set", "rollouts.rounds=2"]) == 1
    assert "run collm train rollouts first" in capsys.readouterr().err
    config = ["--config", str(tiny.write())]
    assert main(["rollouts", *config]) == 0
    folder = out / "rollouts" / "collm-0"
    done = json.loads((folder / "done.json").read_text())
    assert len(done["rewards"]) == 2
    kept = GateArtifact.load(folder / "gate")
    trained = GateArtifact.load(out / "train" / "collm-0" / "gate")
    assert torch.equal(kept.theta, trained.theta) == (done["kept"] == "start")
    assert main(["calibrate", *config]) == 0
    assert torch.equal(GateArtifact.load(out / "pair" / "gate").theta, kept.theta)
    # Cut off after the first round, it goes on and ends with the same gate.
    last = Gate.of(GateArtifact.load(folder / "learned")).tensors
    (folder / "done.json").unlink()
    (folder / "round-1" / "gate.safetensors").unlink()
    assert main(["rollouts", *config]) == 0
    again = Gate.of(GateArtifact.load(folder / "learned")).tensors
    assert all(torch.equal(tensor, again[name]) for name, tensor in last.items())
    assert graph.rollouts(tiny.project, 0).done


def test_status_and_what_cannot_be_asked(tiny: TinyProject, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.content["rollouts"] = {"rounds": 1}
    config = ["--config", str(tiny.write())]
    assert main(["status", *config]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "rollouts   collm, seed 0                waits for train (collm, seed 0)" in lines
    assert "calibrate  collm, seed 0                waits for rollouts (collm, seed 0)" in lines
    assert main(["rollouts", *config]) == 1
    assert "run collm train train first" in capsys.readouterr().err
