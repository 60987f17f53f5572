"""Losses against brute force over every Z, and against numbers worked out by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from training.auroc import auroc
from training.losses import Tokens, language, marginal, weak, weakly_joint

V, D, T = 5, 4, 5


@pytest.mark.parametrize("experts", [1, 2, 3])
def test_marginal_is_the_brute_force_sum_over_z_with_the_same_gradients(experts: int) -> None:
    """A toy base (an embedding and a head) in float64; every path of Z is written out, multiplied and summed."""
    torch.manual_seed(experts)
    text = torch.randint(V, (T + 1,))
    expert_logp_TKV = torch.log_softmax(torch.randn(T, experts, V, dtype=torch.float64), -1)

    def parameters() -> list[torch.Tensor]:
        torch.manual_seed(9)
        shapes = ((V, D), (V, D), (experts, D), (experts,))
        return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def parts(embedding: torch.Tensor, head: torch.Tensor, theta: torch.Tensor, bias: torch.Tensor) -> Tokens:
        hidden_TD = embedding[text[:-1]].cumsum(0).tanh()
        gold_T1 = text[1:, None]
        return Tokens(
            gate_NK=hidden_TD @ theta.T + bias,
            base_logp_N=torch.log_softmax(hidden_TD @ head.T, -1).gather(1, gold_T1)[:, 0],
            expert_logp_NK=expert_logp_TKV.gather(2, gold_T1[:, None].expand(T, experts, 1))[..., 0],
            label_N=torch.zeros(T, dtype=torch.long),
        )

    ours = parameters()
    loss = marginal(parts(*ours))
    loss.backward()

    theirs = parameters()
    tokens = parts(*theirs)
    raised_TZ = torch.cat([torch.ones(T, 1, dtype=torch.float64), tokens.gate_NK.exp()], 1)
    gate_TZ = raised_TZ / raised_TZ.sum(1, keepdim=True)
    written_TZ = torch.cat([tokens.base_logp_N[:, None], tokens.expert_logp_NK], 1).exp()
    total = torch.zeros((), dtype=torch.float64)
    for path in itertools.product(range(experts + 1), repeat=T):
        product = torch.ones((), dtype=torch.float64)
        for t, z in enumerate(path):
            product = product * gate_TZ[t, z] * written_TZ[t, z]
        total = total + product
    brute = -total.log() / T
    brute.backward()

    assert float(loss.detach()) == pytest.approx(float(brute.detach()), abs=1e-13)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-13)


def test_marginal_passes_gradcheck() -> None:
    torch.manual_seed(0)
    base, expert = -torch.rand(6, dtype=torch.float64), -torch.rand(6, 2, dtype=torch.float64)
    label = torch.zeros(6, dtype=torch.long)
    gate = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g, b: marginal(Tokens(g, b, expert, label)), (gate, base.requires_grad_()))


def by_hand() -> Tokens:
    """Two tokens: P(defer) 3/4 and 1/5; the base gives the gold 0.2 and 0.9, the expert 0.8 and 0.1."""
    return Tokens(
        gate_NK=torch.tensor([[math.log(3.0)], [math.log(0.25)]]),
        base_logp_N=torch.tensor([0.2, 0.9]).log(),
        expert_logp_NK=torch.tensor([[0.8], [0.1]]).log(),
        label_N=torch.tensor([1, 0]),
    )


def test_numbers_by_hand() -> None:
    # 1/4 * 0.2 + 3/4 * 0.8 = 0.65 and 4/5 * 0.9 + 1/5 * 0.1 = 0.74
    assert float(marginal(by_hand())) == pytest.approx(-(math.log(0.65) + math.log(0.74)) / 2)
    # 5 * -log(3/4) and -log(4/5)
    expected_weak = -(5 * math.log(0.75) + math.log(0.8)) / 2
    assert float(weak(by_hand(), 5.0)) == pytest.approx(expected_weak)
    expected_language = -(math.log(0.2) + math.log(0.9)) / 2
    assert float(language(by_hand())) == pytest.approx(expected_language)
    assert float(weakly_joint(by_hand(), 5.0)) == pytest.approx(expected_language * 2 / 3 + expected_weak / 3)


def test_two_experts_by_hand() -> None:
    # Softmax over logits 0, log 2, log 5: 1/8, 2/8, 5/8. Gold: 0.4, 0.8, 0.16 -> 0.05 + 0.2 + 0.1 = 0.35
    tokens = Tokens(
        gate_NK=torch.tensor([[2.0, 5.0]]).log(),
        base_logp_N=torch.tensor([0.4]).log(),
        expert_logp_NK=torch.tensor([[0.8, 0.16]]).log(),
        label_N=torch.tensor([2]),
    )
    assert float(marginal(tokens)) == pytest.approx(-math.log(0.35))
    assert float(weak(tokens, 8.0)) == pytest.approx(-8 * math.log(5 / 8))


def test_weak_with_one_expert_is_weighted_binary_cross_entropy() -> None:
    torch.manual_seed(1)
    gate, label = torch.randn(20, 1), torch.randint(2, (20,))
    tokens = Tokens(gate, torch.zeros(20), torch.zeros(20, 1), label)
    expected = F.binary_cross_entropy_with_logits(gate[:, 0], label.float(), pos_weight=torch.tensor(8.0))
    torch.testing.assert_close(weak(tokens, 8.0), expected)


def test_losses_survive_extreme_values() -> None:
    gate = torch.tensor([[80.0], [-80.0]], requires_grad=True)
    logp = torch.tensor([-90.0, -1e-7])
    marginal(Tokens(gate, logp, logp.flip(0)[:, None], torch.tensor([1, 0]))).backward()
    assert gate.grad is not None
    assert gate.grad.isfinite().all()


def test_auroc_by_hand() -> None:
    # Positives 0.9, 0.5; negatives 0.5, 0.1. Pairs won: 2 of 2 by 0.9, 0.5 + 1 by 0.5.
    assert auroc(torch.tensor([0.9, 0.5, 0.5, 0.1]), torch.tensor([1, 1, 0, 0])) == pytest.approx(3.5 / 4)
    assert auroc(torch.tensor([0.1, 0.2]), torch.tensor([1, 1])) is None
