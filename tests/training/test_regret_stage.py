"""The stage that learns a regret, with a pair that transformers read; and, slowly, with real engines."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.config import EngineConfig
from engine.gate import GateArtifact
from engine.regret import RegretArtifact
from engine.types import Collaboration, Completion, Look
from tests.oracle.reference import Pair, greedy, hidden_and_logits
from tests.packaging.sources import ROOT
from tests.training.builders import EOS, FakePair, TinyProject, save_model, write_jsonl
from tests.training.test_status import Hub
from training.__main__ import main
from training.push import card
from training.serving import Questions, Result
from training.status import outputs

AHEAD = 3
WORDS = [EOS, *"abcdefgh"]


class ReadPair(FakePair):
    """Takes the place of ``Pair``: what it writes is the oracle's, and how well it answers is made up."""

    def __init__(self, config: EngineConfig, *_: object) -> None:
        self._config = config

    def __enter__(self) -> ReadPair:
        return self

    def complete(self, questions: Questions, asked: Collaboration, _label: str) -> list[Completion]:
        assert asked.threshold is not None
        assert asked.looks
        models = [AutoModelForCausalLM.from_pretrained(lane.model) for lane in self._config.lanes]
        assert self._config.gate.path is not None
        gate = GateArtifact.load(self._config.gate.path)
        pair = Pair(models[0], models[1:], gate.theta, gate.bias, eos=0)
        found = []
        for tokens, begun in zip(questions.tokens, questions.begun, strict=True):
            prompt = tokens.prompt + begun
            most = min(questions.most or 0, len(tokens.completion) - len(begun) + questions.room)
            written = greedy(pair, prompt, most, threshold=asked.threshold)
            looks = []
            for (base, expert), own, token in zip(written.confidences, written.own, written.tokens, strict=True):
                looks.append(Look(base, expert, None if expert is None else own == token))
            reason: Any = written.finish_reason
            found.append(Completion("0", written.tokens, written.sources, [], reason, looks=looks))
        return found


def make(folder: Path) -> TinyProject:
    """A base that is right of the even questions, and an expert that is right of the others; always deferred."""
    tiny = TinyProject.make(folder)
    for number, name in enumerate(("base", "expert1")):
        save_model(folder / name, number, gpt2=number == 1, words=WORDS, padding=0)
    models = [AutoModelForCausalLM.from_pretrained(folder / name) for name in ("base", "expert1")]
    for number, (split, count) in enumerate((("train", 24), ("validation", 10), ("test", 6))):
        write_jsonl(folder / f"{split}.jsonl", [question(models[n % 2], 100 * number + n) for n in range(count)])
    tiny.content["calibrate"] |= {"rates": [1.0], "refine": 0}
    tiny.content["evaluate"]["room"] = 4
    tiny.content["engine"]["vllm"] = {"vocab_size": len(WORDS)}
    return tiny


@torch.inference_mode()
def question(model: Any, seed: int) -> dict[str, Any]:
    """What a model says of a word."""
    rng = random.Random(seed)
    text: list[int] = [rng.randrange(1, len(WORDS)) for _ in range(rng.randint(3, 9))]
    said: list[int] = []
    while len(said) < 5:
        token = int(hidden_and_logits(model, text + said)[1].argmax())
        if token == 0:
            break
        said.append(token)
    said = said or [1]
    prompt, completion = ("".join(WORDS[token] for token in tokens) for tokens in (text, said))
    return {"prompt": prompt, "completion": completion, "complete": False}


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    """Whose pipeline has run."""
    tiny = make(tmp_path_factory.mktemp("regret"))
    tiny.content["regret"] = {"ahead": AHEAD, "width": 4, "steps": 60}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.serving.Pair", ReadPair)
        assert main(["pipeline", "--config", str(tiny.write())]) == 0
    return tiny


def test_what_is_learned_from_is_what_the_base_says_when_it_has_read_on(learned: TinyProject) -> None:
    """By a loop over the gold completions that shares nothing with the stage but the gate."""
    project, folder = learned.project, learned.folder / "out" / "regret" / "collm-0"
    base, expert = (AutoModelForCausalLM.from_pretrained(learned.folder / name) for name in ("base", "expert1"))
    gate = GateArtifact.load(project.folder("calibrate", "collm-0", "gate"))
    pair = Pair(base, [expert], gate.theta, gate.bias, eos=0)
    found = json.loads((folder / "read.json").read_text())
    states = torch.from_file(str(folder / "looked-back" / "hidden.bin"), size=16 * sum(map(len, found.values())))
    row, outcomes, ended = 0, set(), 0
    for split in ("train", "validation"):
        expected = []
        for number, tokens in enumerate(project.data(split).tokens):
            for index, gold in enumerate(tokens.completion):
                text, left = tokens.prompt + tokens.completion[:index], len(tokens.completion) - index + 4
                with torch.inference_mode():
                    draft = int(hidden_and_logits(base, text)[1].argmax())
                trace = greedy(pair, text, left, threshold=gate.default_threshold)
                if trace.sources[0] == 0 or trace.tokens[0] == draft:
                    continue
                last = min(AHEAD, len(trace.tokens) - 1)
                ended += last < AHEAD
                (sure, asked), behind = trace.confidences[0], trace.confidences[1:last]
                least = min((each for _, each in behind if each is not None), default=1.0)
                expected.append((number, index, trace.tokens[:last], draft == gold, [sure, asked, least]))
                with torch.inference_mode():
                    state, _ = hidden_and_logits(base, text + trace.tokens[:last])
                torch.testing.assert_close(states.view(-1, 16)[row], state, rtol=1e-4, atol=1e-4)
                outcomes.add(draft == gold)
                row += 1
        reads = [(each["example"], each["index"], each["read"], each["regretted"]) for each in found[split]]
        assert reads == [each[:4] for each in expected]
        for ours, theirs in zip(found[split], expected, strict=True):
            assert ours["sure"] == pytest.approx(theirs[4], abs=1e-5)
        assert len(expected) > 20
    assert outcomes == {True, False}
    assert ended


def test_the_threshold_is_the_best_on_validation_questions_and_the_row_is_in_the_table(learned: TinyProject) -> None:
    out = learned.folder / "out"
    done = json.loads((out / "regret" / "collm-0" / "done.json").read_text())
    assert done["made"]
    assert [point["threshold"] for point in done["points"]] == [1.0, 0.9, 0.8, 0.65, 0.5, 0.35, 0.2]
    best = max(point["score"] for point in done["points"])
    # Of equals the one that takes back least.
    assert done["chosen"] == next(point for point in done["points"] if point["score"] == best)
    assert done["points"][0]["score"] < best
    assert done["held_out_loss"] < done["loss_of_chance"]
    calibrated, pair = out / "calibrate" / "collm-0" / "gate", out / "pair" / "gate"
    made = RegretArtifact.load(pair)
    assert made.default_threshold == done["chosen"]["threshold"]
    assert (made.ahead, made.kind, made.hidden_size) == (AHEAD, "mlp", 16)
    assert made.base == GateArtifact.load(calibrated).base
    assert torch.equal(GateArtifact.load(pair).theta, GateArtifact.load(calibrated).theta)
    row = json.loads((out / "evaluate" / "table.json").read_text())["rows"]["Co-LLM, regret"]["0"]
    assert (row["regret"], row["taken_back"]) == (made.default_threshold, round(10 * (1 - made.default_threshold)))
    assert "| taken back per answer |" in (out / "evaluate" / "table.md").read_text()


def copied(learned: TinyProject, folder: Path) -> TinyProject:
    """The same project elsewhere: nothing in it knows in which folder it was made."""
    shutil.copytree(learned.folder, folder, dirs_exist_ok=True)
    return TinyProject(folder, json.loads(json.dumps(learned.content).replace(str(learned.folder), str(folder))))


def states(tiny: TinyProject) -> dict[str, str]:
    """What ``status`` says of each stage; of scores only the last."""
    return {found.stage: " ".join([found.state, *found.why]) for found in outputs(tiny.project)}


def run(tiny: TinyProject, *command: str) -> int:
    return main([command[0], "--config", str(tiny.write()), *command[1:]])


def test_it_is_off_and_calibrate_comes_first(
    tmp_path: Path, learned: TinyProject, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("training.serving.Pair", ReadPair)
    tiny = copied(learned, tmp_path)
    shutil.rmtree(tiny.folder / "out" / "regret")
    assert run(tiny, "evaluate") == 1
    assert "run collm train regret first" in capsys.readouterr().err
    # What is exported anew has no regret of before.
    assert run(tiny, "calibrate") == 0
    assert RegretArtifact.beside(tiny.folder / "out" / "pair" / "gate") is None
    assert states(tiny)["regret"] == "missing"
    assert states(tiny)["export"] == "waits regret (collm, seed 0)"
    assert states(tiny)["evaluate"] == "waits regret"
    assert run(tiny, "regret") == 0
    assert RegretArtifact.beside(tiny.folder / "out" / "pair" / "gate") is not None
    assert set(states(tiny).values()) == {"done"}
    tiny.content["regret"]["ahead"] = 0
    assert states(tiny)["export"] == "stale the gate is another one"
    tiny.content["regret"]["ahead"] = AHEAD
    (tiny.folder / "out" / "calibrate" / "collm-0" / "done.json").unlink()
    capsys.readouterr()
    assert run(tiny, "regret") == 1
    assert "run collm train calibrate first" in capsys.readouterr().err
    assert states(tiny)["regret"] == "waits calibrate (collm, seed 0)"


def test_what_was_written_and_read_is_not_done_again(
    tmp_path: Path, learned: TinyProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off behind its answers, the stage goes on without an engine, and ends with the same regret."""
    tiny = copied(learned, tmp_path)
    folder = tiny.folder / "out" / "regret" / "collm-0"
    before = RegretArtifact.load(folder / "gate")
    for name in ("done.json", "gate/regret.json", "gate/regret.safetensors"):
        (folder / name).unlink()
    monkeypatch.setattr("training.serving.Pair", None)
    assert run(tiny, "regret") == 0
    after = RegretArtifact.load(folder / "gate")
    assert (after.default_threshold, after.numbers.tolist()) == (before.default_threshold, before.numbers.tolist())
    assert torch.equal(after.theta, before.theta)


class SpoiledPair(ReadPair):
    """Whatever takes tokens back is wrong."""

    def answer(self, questions: Questions, label: str, *, regret: float = 1.0, **how: Any) -> Result:
        found = super().answer(questions, label, **how)
        return found if regret == 1.0 else replace(found, answers=[replace(each, text="") for each in found.answers])


def test_where_nothing_is_gained_nothing_is_taken_back(
    tmp_path: Path, learned: TinyProject, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("training.serving.Pair", SpoiledPair)
    tiny = copied(learned, tmp_path)
    shutil.rmtree(tiny.folder / "out" / "regret")
    assert run(tiny, "regret") == 0
    said = capsys.readouterr().out
    assert "warning: " in said
    assert "none beats" in said
    assert RegretArtifact.load(tiny.folder / "out" / "pair" / "gate").default_threshold == 1.0
    assert "this bettered nothing" in card(tiny.project, None)
    assert run(tiny, "evaluate") == 0
    rows = json.loads((tiny.folder / "out" / "evaluate" / "table.json").read_text())["rows"]
    row = rows["Co-LLM, regret"]["0"]
    assert (row["regret"], row["taken_back"], row["exact_match"]) == (1.0, 0.0, rows["Co-LLM"]["0"]["exact_match"])


def test_without_anything_to_learn_from_the_pair_is_as_calibrated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The expert is the base."""
    tiny = make(tmp_path)
    tiny.content["experts"][0]["model"] = str(tmp_path / "base")
    tiny.content["regret"] = {"ahead": AHEAD}
    monkeypatch.setattr("training.serving.Pair", ReadPair)
    assert run(tiny, "pipeline") == 0
    assert "there is nothing to learn a regret from" in capsys.readouterr().out
    assert RegretArtifact.beside(tmp_path / "out" / "pair" / "gate") is None
    assert set(states(tiny).values()) == {"done"}
    assert "Co-LLM, regret" not in (tmp_path / "out" / "evaluate" / "table.md").read_text()


def test_the_card_and_the_hub_have_it(tmp_path: Path, learned: TinyProject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hub, "folder", tmp_path / "hub", raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    tiny = copied(learned, tmp_path)
    assert run(tiny, "push", "--to", "me/gate") == 0
    pushed = tmp_path / "hub" / "me" / "gate"
    assert RegretArtifact.load(pushed).ahead == AHEAD
    assert (
        f"once the base has read {AHEAD} tokens from it on: with `gate.regret = " in (pushed / "README.md").read_text()
    )
    tiny.content["regret"]["ahead"] = 0
    assert run(tiny, "calibrate") == 0
    assert run(tiny, "push", "--to", "me/gate") == 0
    assert RegretArtifact.beside(pushed) is None
    assert "with a regret" not in (pushed / "README.md").read_text()


DEMO = ROOT / "models" / "demo"


@pytest.mark.slow
def test_real_engines_write_what_the_loop_does_and_take_tokens_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo's base and one of its experts, which is asked everywhere, also of what it does not know."""
    pytest.importorskip("vllm")
    tiny = TinyProject.make(tmp_path)
    asked = json.loads((DEMO / "questions.json").read_text())
    for split, some in (("train", asked[::25]), ("validation", asked[7::40]), ("test", asked[3::100])):
        write_jsonl(tmp_path / f"{split}.jsonl", [{key: q[key] for key in ("prompt", "completion")} for q in some])
    tiny.content["base"]["model"] = str(DEMO / "base")
    tiny.content["experts"] = [{"name": "codes", "model": str(DEMO / "codes")}]
    tiny.content["calibrate"] |= {"rates": [1.0], "refine": 0}
    tiny.content["regret"] = {"ahead": AHEAD, "steps": 200, "features": ["margin"]}
    vllm = {"dtype": "float32", "max_model_len": 256}
    tiny.content["engine"] = {"kv_cache_memory_bytes": 1 << 25, "max_num_seqs": 16, "vllm": vllm}
    out, found = tmp_path / "out" / "regret" / "collm-0", []
    with monkeypatch.context() as patch:
        patch.setattr("training.serving.Pair", ReadPair)
        for stage in ("train", "calibrate", "regret"):
            assert run(tiny, stage) == 0
        found.append(json.loads((out / "read.json").read_text()))
    shutil.rmtree(out)
    assert run(tiny, "regret") == 0
    found.append(json.loads((out / "read.json").read_text()))
    for split in ("train", "validation"):
        loop, served = ([{**each, "sure": None} for each in one[split]] for one in found)
        assert served == loop
        for ours, theirs in zip(found[1][split], found[0][split], strict=True):
            assert ours["sure"] == pytest.approx(theirs["sure"], abs=1e-3)
    done = json.loads((out / "done.json").read_text())
    assert done["made"]
    assert done["points"][0]["taken_back"] == 0 < done["points"][-1]["taken_back"]
    # Who is asked everywhere is wrong of most, and the base sees it.
    assert done["chosen"]["score"] == max(point["score"] for point in done["points"]) > done["points"][0]["score"]
