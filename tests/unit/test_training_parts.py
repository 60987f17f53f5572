"""Scoring, weak supervision, calibration and the plain joint loop, on tiny random models."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from training.calibrate import Point, choose, sweep
from training.hf import hidden_and_logits
from training.marginal import MarginalSettings, fit_marginal, marginal_loss
from training.reference import BASE, EXPERT, joint_greedy
from training.score import Scores, TokenExample, score_completions
from training.weak import WeakSettings, fit_weak, mean_head_row, weak_labels

V, D = 24, 16
PROMPT = [3, 5, 7]
BIAS = torch.zeros(1)


def make_model(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=0,
    )
    model: PreTrainedModel = LlamaForCausalLM(config).eval().requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    return make_model(0), make_model(1)


def greedy_from(model: PreTrainedModel, prompt: list[int], length: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=length)
    return out[0, len(prompt) :].tolist()


def test_thresholds_at_the_ends_are_one_model_alone(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    base, expert = models
    theta = torch.randn(1, D)
    never = joint_greedy(base, expert, theta, BIAS, 1.0, PROMPT, 12)
    always = joint_greedy(base, expert, theta, BIAS, -1.0, PROMPT, 12)
    assert (never.tokens, set(never.sources)) == (greedy_from(base, PROMPT, 12), {BASE})
    assert (always.tokens, set(always.sources)) == (greedy_from(expert, PROMPT, 12), {EXPERT})
    assert never.deferral_rate == 0
    assert always.deferral_rate == 1


def test_the_joint_loop_defers_strictly_above_the_threshold(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    base, expert = models
    torch.manual_seed(3)
    theta = torch.randn(1, D)
    output = joint_greedy(base, expert, theta, BIAS, 0.5, PROMPT, 12)
    assert set(output.sources) == {BASE, EXPERT}
    ids = list(PROMPT)
    for token, source, probability in zip(output.tokens, output.sources, output.probabilities, strict=True):
        hidden, _ = hidden_and_logits(base, torch.tensor([ids]))
        assert probability == pytest.approx(float(torch.sigmoid(hidden[0, -1] @ theta[0])))
        assert (source == EXPERT) == (probability > 0.5)
        _, logits = hidden_and_logits(expert if source == EXPERT else base, torch.tensor([ids]))
        assert token == int(logits[0, -1].argmax())
        ids.append(token)
    half = joint_greedy(base, expert, torch.zeros(1, D), BIAS, 0.5, PROMPT, 2)
    assert half.sources == [BASE, BASE]


def test_the_joint_loop_refuses_what_it_cannot_decode(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        joint_greedy(*models, torch.zeros(1, D), BIAS, 0.5, [], 3)
    with pytest.raises(ValueError, match="has 2 experts"):
        joint_greedy(*models, torch.zeros(2, D), torch.zeros(2), 0.5, PROMPT, 3)


def test_scores_do_not_depend_on_the_batch(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    base, expert = models
    examples = [TokenExample([1, 2, 3], [4, 0]), TokenExample([9], [8, 7, 6, 5, 0]), TokenExample([2, 2], [1])]
    together = score_completions(base, expert, examples, batch_size=3)
    alone = [score_completions(base, expert, [e]) for e in examples]
    torch.testing.assert_close(together.hidden, torch.cat([s.hidden for s in alone]))
    for column in ("gold", "base_top", "expert_top"):
        assert torch.equal(getattr(together, column), torch.cat([getattr(s, column) for s in alone]))
    assert together.gold.tolist() == [4, 0, 8, 7, 6, 5, 0, 1]
    _, logits = hidden_and_logits(base, torch.tensor([[1, 2, 3, 4, 0]]))
    assert together.base_top[:2].tolist() == logits[0, 2:4].argmax(-1).tolist()
    with pytest.raises(ValueError, match="empty prompt"):
        score_completions(base, expert, [TokenExample([], [1])])


def test_weak_labels_are_where_only_the_expert_is_right() -> None:
    gold = torch.tensor([1, 1, 1, 1])
    scores = Scores(torch.zeros(4, D), gold, torch.tensor([1, 2, 1, 2]), torch.tensor([1, 1, 2, 2]))
    assert weak_labels(scores).tolist() == [0, 1, 0, 0]


def test_fitting_separates_what_is_separable(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    torch.manual_seed(5)
    hidden = torch.randn(400, D)
    labels = (hidden[:, 2] > 0.5).float()
    hidden[:, 0] = 1.0  # the constant that stands in for a bias
    theta = fit_weak(hidden, labels, mean_head_row(models[0]), WeakSettings(learning_rate=0.1))
    right = ((hidden @ theta[0] > 0).float() == labels).float().mean()
    assert right > 0.9


def test_the_marginal_loss_is_that_of_the_mixture() -> None:
    base, expert, p = torch.tensor([0.2, 0.9]), torch.tensor([0.7, 0.0]), torch.tensor([0.75, 0.1])
    loss = marginal_loss(base.log(), expert.log(), torch.logit(p))
    torch.testing.assert_close(loss, -((1 - p) * base + p * expert).log().mean())


def test_marginal_training_defers_what_only_the_expert_knows() -> None:
    base, expert = make_model(0), make_model(1)
    before = {name: weight.clone() for name, weight in expert.state_dict().items()}
    learned = [TokenExample([i, 2], greedy_from(expert, [i, 2], 1)) for i in range(3, V)]
    theta = fit_marginal(base, expert, torch.zeros(1, D), learned, MarginalSettings(1e-2, epochs=30))
    hidden = score_completions(base, expert, learned).hidden
    assert torch.sigmoid(hidden @ theta[0]).mean() > 0.6
    assert all(torch.equal(before[name], weight) for name, weight in expert.state_dict().items())
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_the_sweep_defers_the_rates_asked_for() -> None:
    probabilities = torch.linspace(0, 1, 101)
    asked: list[float] = []

    def decode(threshold: float) -> tuple[float, float]:
        asked.append(threshold)
        return 0.5, float((probabilities > threshold).float().mean())

    points = sweep(probabilities, decode, (0.0, 0.25, 1.0))
    assert [p.threshold for p in points] == asked
    assert [p.deferral_rate for p in points] == pytest.approx([0, 0.25, 1], abs=0.01)


def test_the_threshold_is_in_the_widest_gap_of_the_best_range() -> None:
    points = [Point(0.0, 1.0, 0.1, 0.0), Point(0.2, 0.8, 0.9, 0.2), Point(0.3, 0.3, 0.9, 0.3), Point(1, -1.0, 0, 1)]
    probabilities = torch.tensor([0.01, 0.02, 0.35, 0.4, 0.7, 0.75, 0.99])
    assert choose(points, probabilities) == pytest.approx(0.55)
    alone = [points[0], points[1], points[3]]
    assert choose(alone, probabilities) == pytest.approx(0.185)
