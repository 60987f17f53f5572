"""``data.chat_templates = "own"``: experts with the base's vocabulary read conversations by templates of their own."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from engine.types import GenerationRequest
from tests.training.builders import TinyProject, write_jsonl
from tests.training.test_evaluation import Letters, listening
from training import graph
from training.checkpoints import forward, load_causal
from training.serving import Pair, questions_of
from training.stages import calibrate, export, train
from training.stages.score import score_split

PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
NAMED = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"


def set_template(folder: Path, template: str) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


@pytest.fixture
def talking(tmp_path: Path) -> TinyProject:
    """Two experts, the first with a template of its own; one row that is no conversation."""
    made = TinyProject.make(tmp_path, experts=2)
    set_template(tmp_path / "base", PLAIN)
    set_template(tmp_path / "expert1", NAMED)
    talk = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    for split in ("train", "validation", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", [{"messages": talk}, {"prompt": "c", "completion": "d"}])
    made.content["data"]["chat_templates"] = "own"
    return made


def test_scores_are_of_what_each_reads(talking: TinyProject) -> None:
    project = talking.project
    scores = score_split(project, "train")
    for expert, prompts in enumerate((["user: a?", "c"], ["a?", "c"])):
        model = load_causal(talking.folder / f"expert{expert + 1}")
        for start, text, example in zip(scores.starts, prompts, project.data("train").tokens, strict=False):
            ids = project.tokenizer(text)["input_ids"] + example.completion
            with torch.no_grad():
                logits_TV = forward(model, torch.tensor([ids]))[1][0, :, :257]
            at = len(ids) - len(example.completion)
            expected_N = torch.log_softmax(logits_TV[at - 1 : -1], -1).gather(1, torch.tensor(ids[at:])[:, None])[:, 0]
            found_N = scores.experts[expert].logp_N[start : start + len(example.completion)]
            torch.testing.assert_close(found_N, expected_N)


def test_other_templates_make_other_scores_of_experts_alone(talking: TinyProject) -> None:
    def fingerprints() -> list[str]:
        return [graph.scores(talking.project, "train", name).fingerprint for name in ("base", "e1")]

    own = fingerprints()
    talking.content["data"]["chat_templates"] = "base"
    base = fingerprints()
    assert (own[0] == base[0], own[1] == base[1]) == (True, False)


def test_the_engine_is_asked_by_the_same_prompts(talking: TinyProject, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[GenerationRequest] = []

    monkeypatch.setattr("training.serving.Engine", listening(asked))
    project = talking.project
    reader = project.own_template("e1")
    assert (reader is None, project.own_template("e2")) == (False, None)
    own = project.tokenizer("user: a?")["input_ids"]
    config: Any = None
    with Pair(config, Letters(), {1: reader}) as pair:
        questions = questions_of(project, "test", None)
        for member in (None, 1, 2):
            pair.answer(questions, "test", policy="always", member=member)
    by_base = [tokens.prompt for tokens in project.data("test").tokens]
    sent = [(request.prompt, request.collaboration.prompts) for request in asked[-6:]]
    assert sent[:2] == [(by_base[0], ((1, own),)), (by_base[1], ())]
    assert sent[2:4] == [(own, ()), (by_base[1], ())]
    assert sent[4:] == [(by_base[0], ()), (by_base[1], ())]


@pytest.mark.usefixtures("fake_pair")
def test_the_pair_is_exported_to_be_served_so(talking: TinyProject) -> None:
    project = talking.project
    train.run(project)
    calibrate.run(project)
    export.run(project)
    served = tomllib.loads((talking.folder / "out" / "pair" / "collm.toml").read_text())
    assert served["server"] == {"chat_templates": "own"}
