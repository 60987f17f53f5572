"""Regret: which tokens it learns from, what it learns, and the stage, with a pair that is read by transformers."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.checkpoints import ModelIdentity
from engine.config import EngineConfig
from engine.gate import GateArtifact
from engine.gates import FEATURES
from engine.hindsight import Hindsight
from engine.regret import RegretArtifact
from engine.types import Collaboration, Completion, Look
from tests.oracle.reference import Pair, greedy, hidden_and_logits
from tests.training.builders import EOS, FakePair, TinyProject, save_model, write_jsonl
from tests.training.test_status import Hub
from training.__main__ import main
from training.errors import SettingsError
from training.gate_only import Gate
from training.push import card
from training.regret import Disputes, Positions, chance, fit_regret, regret_loss, value
from training.scoring import ModelScores, PairScores
from training.serving import Questions, Result
from training.settings import RegretSettings, load_settings
from training.stages.regret import read_of
from training.status import outputs

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


# -- the stage --------------------------------------------------------------------------------------------------

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
