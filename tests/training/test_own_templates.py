"""``data.chat_templates = "own"``: experts with the base's vocabulary read conversations by templates of their own."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from engine.types import Collaboration, GenerationRequest
from tests.training.builders import FakePair, TinyProject, write_jsonl
from tests.training.test_evaluation import Letters, listening
from training import graph
from training.checkpoints import forward, load_causal
from training.errors import TrainingError
from training.serving import pair_of, questions_of
from training.stages import calibrate, export, rollouts, train
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
    monkeypatch.setattr(type(project), "tokenizer", Letters())
    with pair_of(project, project.base, None) as pair:
        questions = questions_of(project, "test", None)
        for member in (None, 1, 2):
            pair.answer(questions, "test", policy="always", member=member)
    by_base = [tokens.prompt for tokens in project.data("test").tokens]
    sent = [(request.prompt, request.collaboration.prompts) for request in asked[-6:]]
    assert sent[:2] == [(by_base[0], ((1, own),)), (by_base[1], ())]
    assert sent[2:4] == [(own, ()), (by_base[1], ())]
    assert sent[4:] == [(by_base[0], ()), (by_base[1], ())]


def test_text_that_stands_already_is_read_by_all(talking: TinyProject, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[GenerationRequest] = []

    monkeypatch.setattr("training.serving.Engine", listening(asked))
    project = talking.project
    own = project.tokenizer("user: a?")["input_ids"]
    tokens = project.data("test").tokens
    room = project.settings.evaluate.room
    assert [len(each.completion) for each in tokens] == [2, 2]
    questions = replace(questions_of(project, "test", None), begun=[[5], [6, 7]], most=room + 1)
    monkeypatch.setattr(type(project), "tokenizer", Letters())
    with pair_of(project, project.base, None) as pair:
        pair.complete(questions, Collaboration(policy="always"), "test")
    assert [request.prompt for request in asked] == [[*tokens[0].prompt, 5], [*tokens[1].prompt, 6, 7]]
    assert [request.collaboration.prompts for request in asked] == [((1, [*own, 5]),), ()]
    # No longer than the answer may become, nor than is asked for.
    assert [request.sampling.max_tokens for request in asked] == [room + 1, room]


def test_answers_that_the_gate_draws_are_asked_by_the_same_prompts(
    talking: TinyProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[set[int]] = []

    class Noted(FakePair):
        def __init__(self, _config: object, _tokenizer: object, templates: dict[int, Any] | None = None) -> None:
            readers.append(set(templates or {}))

        def __enter__(self) -> Noted:
            return self

        def complete(self, *_: object, **__: object) -> None:
            raise TrainingError("noted")

    monkeypatch.setattr("training.serving.Pair", Noted)
    talking.content["rollouts"] = {"rounds": 1}
    train.run(talking.project)
    with pytest.raises(TrainingError, match="noted"):
        rollouts.run(talking.project)
    # What is compared on validation questions, and what is drawn.
    assert readers == [{1}, {1}]


@pytest.mark.usefixtures("fake_pair")
def test_the_pair_is_exported_to_be_served_so(talking: TinyProject) -> None:
    project = talking.project
    train.run(project)
    calibrate.run(project)
    export.run(project)
    served = tomllib.loads((talking.folder / "out" / "pair" / "collm.toml").read_text())
    assert served["server"] == {"chat_templates": "own"}
