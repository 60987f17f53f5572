"""The demo pair's gate: trained on the gate split, calibrated on the validation split."""

from __future__ import annotations

import datetime
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from engine.gate import GateArtifact, model_identity
from training.calibrate import choose, curve, sweep
from training.demo.corpus import KNOWN, MADE_UP, REPETITIONS, Corpus, tokenized
from training.demo.evaluate import decode_all, summary
from training.demo.facts import source
from training.demo.tokenizer import save_tokenizer
from training.demo.train import save_model
from training.marginal import MarginalSettings, fit_marginal
from training.score import score_completions
from training.weak import WeakSettings, fit_weak, mean_head_row, weak_labels

EXPERT_NAME = "codes"
VALIDATION_ENTITIES = 30
RATES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)


def train_gate(
    base: PreTrainedModel,
    expert: PreTrainedModel,
    corpus: Corpus,
    tokenizer: Tokenizer,
    base_dir: Path,
    expert_dir: Path,
) -> GateArtifact:
    """Train theta by weak supervision, then theta and ``base``, and choose the default threshold by decoding.

    ``base`` is trained in place and saved to ``base_dir``.
    """
    weak, marginal = WeakSettings(), MarginalSettings()
    examples = corpus.gate_examples(tokenizer)
    scores = score_completions(base, expert, examples)
    labels = weak_labels(scores)
    theta = fit_weak(scores.hidden, labels, mean_head_row(base), weak)
    theta = fit_marginal(base, expert, theta, examples, marginal)
    bias = torch.zeros(1)
    save_model(base, base_dir)
    save_tokenizer(tokenizer, base_dir)

    validation = corpus.evaluation_questions("validation", VALIDATION_ENTITIES)
    observed = score_completions(base, expert, tokenized(validation, tokenizer))
    probabilities = torch.sigmoid(observed.hidden @ theta[0])

    def decode(threshold: float) -> tuple[float, float]:
        answers = decode_all(base, expert, theta, bias, threshold, validation, tokenizer)
        row = summary(answers)
        return row["exact_match"], row["deferral_rate"]

    points = sweep(probabilities, decode, RATES)
    return GateArtifact(
        theta=theta,
        bias=bias,
        experts=(EXPERT_NAME,),
        base=model_identity(base_dir),
        expert_identities=(model_identity(expert_dir),),
        default_threshold=choose(points, probabilities),
        calibration=curve(points),
        training={
            "weak supervision, base frozen": asdict(weak),
            "marginal likelihood, theta and base": asdict(marginal),
            "examples": len(examples),
            "tokens": len(labels),
            "positive_share": round(float(labels.mean()), 4),
            "seed": corpus.seed,
        },
        data=f"questions about {len(corpus.splits['gate'])} entities that the base does not know, {KNOWN} "
        f"questions about entities that it knows, {REPETITIONS + MADE_UP} with made-up names; {source()}",
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )
