"""Calibration and evaluation with a made-up pair whose rates and scores are known; the oracle; incomplete rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.blends import Blend
from engine.types import BASE, BLEND, NO_TOKEN, Completion, Cost, GenerationRequest, TokenLogprobs
from tests.training.builders import BEST_RATE, TinyProject, examples, write_jsonl
from training.__main__ import main
from training.answers import AnswerCache
from training.data import Example, TokenExample
from training.report import CALIBRATED_CONFIDENCE, COLLM, CONFIDENCE, ORACLE, RANDOM, UNTRAINED_CONFIDENCE
from training.scoring import ModelScores, PairScores
from training.serving import SAMPLE_TEMPERATURE, Answer, Pair, Questions, Result
from training.stages.evaluate import _oracle, _tokens

pytest.importorskip("matplotlib")


def answers(tiny: TinyProject, lane: str, what: str) -> list[dict[str, Any]]:
    """What was asked of a lane under this name."""
    folder = tiny.folder / "out" / "evaluate" / "answers" / lane
    found = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    return [content for content in found if content["what"] == what]


def rows_of(tiny: TinyProject) -> dict[str, Any]:
    """The table's rows of seed 0."""
    rows = json.loads((tiny.folder / "out" / "evaluate" / "table.json").read_text())["rows"]
    return {name: by_seed["0"] for name, by_seed in rows.items()}


@pytest.mark.usefixtures("fake_pair")
def test_baselines_defer_at_the_rate_of_the_gate(tiny: TinyProject) -> None:
    for number, split in enumerate(("validation", "test")):
        write_jsonl(tiny.folder / f"{split}.jsonl", examples(20, number))
    assert main(["pipeline", "--config", str(tiny.write())]) == 0
    curve = json.loads((tiny.folder / "out" / "calibrate" / "collm-0" / "curve.json").read_text())
    done = json.loads((tiny.folder / "out" / "calibrate" / "collm-0" / "done.json").read_text())
    # The gate's greatest and least value, which have nominal rates like none of the sweep's, are not chosen from.
    scores = [
        point["score"]
        for point in curve["points"]
        if not ((point["nominal_rate"] == 0 and point["threshold"] < 1) or 0.95 < point["nominal_rate"] < 1)
    ]
    assert done["score"] == max(scores) > min(scores) > 0
    rows = rows_of(tiny)
    assert rows[COLLM]["deferral_rate"] == pytest.approx(1 - done["threshold"], abs=0.005)
    assert rows[RANDOM]["deferral_rate"] == pytest.approx(rows[COLLM]["deferral_rate"], abs=0.005)
    # Chosen on validation questions, where the made-up pair is as it is on the test's.
    assert rows[CONFIDENCE]["deferral_rate"] == pytest.approx(done["deferral_rate"], abs=0.02)
    best = rows[CALIBRATED_CONFIDENCE]
    assert best["deferral_rate"] == pytest.approx(BEST_RATE, abs=0.1)
    swept = [Result.from_json(found) for found in answers(tiny, "members", "confidence, validation")]
    assert best["exact_match"] == max(result.score for result in swept)


@pytest.mark.usefixtures("fake_pair")
def test_what_no_gate_decides_is_answered_once_for_all_seeds(tiny: TinyProject) -> None:
    tiny.content["seeds"] = [0, 1]
    assert main(["pipeline", "--config", str(tiny.write())]) == 0
    table = json.loads((tiny.folder / "out" / "evaluate" / "table.json").read_text())["rows"]
    assert all(set(table[name]) == {"0", "1"} for name in (COLLM, RANDOM, CONFIDENCE, CALIBRATED_CONFIDENCE))
    for seed in (0, 1):
        asked = (tiny.folder / "out" / "evaluate" / "answers" / f"collm-{seed}").glob("*.json")
        assert {json.loads(file.read_text())["how"]["policy"] for file in asked} <= {"threshold", "always", "never"}
    thresholds = [found["how"]["threshold"] for found in answers(tiny, "members", "confidence, validation")]
    assert len(thresholds) == len(set(thresholds)) >= 11


@pytest.mark.usefixtures("fake_pair")
def test_which_of_several_experts_writes_is_the_gate_s_choice_in_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a gate it would be the first expert, always."""
    asked: list[tuple[str, bool]] = []
    answers_of = AnswerCache.answers

    def noted(cache: AnswerCache, what: str, questions: Questions, **how: Any) -> Result:
        asked.append((how.get("policy", "member"), cache.has_gate))
        return answers_of(cache, what, questions, **how)

    monkeypatch.setattr(AnswerCache, "answers", noted)
    assert main(["pipeline", "--config", str(TinyProject.make(tmp_path, experts=2).write())]) == 0
    assert {policy for policy, has_gate in asked if has_gate} >= {"confidence", "random"}
    assert not any(policy in ("confidence", "random") for policy, has_gate in asked if not has_gate)


@pytest.mark.usefixtures("fake_pair")
def test_a_limit_holds_for_every_row(tiny: TinyProject) -> None:
    tiny.content["evaluate"]["limit"] = 3
    assert main(["pipeline", "--config", str(tiny.write())]) == 0
    rows = rows_of(tiny)
    assert {name: row["questions"] for name, row in rows.items()} == dict.fromkeys(rows, 3)
    asked = tiny.project.data("test").tokens[::2]
    assert rows[ORACLE]["tokens"] == sum(len(example.completion) for example in asked)


@pytest.mark.usefixtures("fake_pair")
def test_thresholds_of_confidence_are_chosen_on_the_questions_of_the_calibration(tiny: TinyProject) -> None:
    tiny.content["train"]["mode"] = "joint"
    for limit in (2, 5):
        tiny.content["calibrate"]["limit"] = limit
        assert main(["pipeline", "--config", str(tiny.write())]) == 0
        assert UNTRAINED_CONFIDENCE in rows_of(tiny)
        for lane in ("collm-0", "members"):
            assert {len(found["answers"]) for found in answers(tiny, lane, "confidence, validation")} == {limit}


@pytest.mark.usefixtures("fake_pair")
def test_rows_of_other_strategies_and_of_as_many_steps_of_one_member(tiny: TinyProject) -> None:
    for number, split in enumerate(("validation", "test")):
        write_jsonl(tiny.folder / f"{split}.jsonl", examples(20, number))
    assert main(["pipeline", "--config", str(tiny.write())]) == 0
    before = rows_of(tiny)
    tiny.content["evaluate"] |= {
        "strategies": ["veto", "mixture", "product", "union", "characters", "veto"],
        "samples": 2,
    }
    tiny.content["seeds"] = [0, 1]
    # Always deferred: so a veto has something to better.
    tiny.content["calibrate"]["rates"] = [1.0]
    tiny.content["calibrate"]["refine"] = 0
    assert main(["pipeline", "--config", str(tiny.write())]) == 0
    table = json.loads((tiny.folder / "out" / "evaluate" / "table.json").read_text())["rows"]
    rows = rows_of(tiny)
    others = ["Co-LLM, veto", "Co-LLM, mixture", "Co-LLM, product", "Co-LLM, union", "characters"]
    sampled = "base alone, likeliest of 2 samples"
    assert [name for name in rows if name not in before] == [*others, sampled]
    assert list(rows)[-1] == ORACLE
    assert all(set(table[name]) == {"0", "1"} for name in others)
    # As often as is best, of the vetoes that are tried.
    assert rows["Co-LLM, veto"]["veto"] == 0.5
    rates = {name: rows[name]["deferral_rate"] for name in others}
    assert rates == pytest.approx(dict(zip(others, (0.5, 0.45, 0.5, 0.55, 0.6), strict=True)), abs=0.01)
    assert all(rows[name]["expert_seconds"] > 0 for name in others)
    (asked,) = (found for found in answers(tiny, "members", "samples"))
    assert (asked["how"]["member"], asked["how"]["samples"]) == (0, 2)
    (mixture,) = answers(tiny, "collm-1", "mixture")
    assert mixture["how"]["blend"]["from_gate"] is True
    assert mixture["how"]["blend"]["weights"] == [[0, 0.0], [1, 0.0]]


def hand_made() -> PairScores:
    """Two examples, of 2 and 3 tokens; the second one's middle token is nobody's."""
    gold_N = torch.ones(5, dtype=torch.long)
    logp_N = torch.full((5,), -1.0)
    base = ModelScores(logp_N, torch.tensor([1, 0, 1, 0, 0]), torch.arange(5.0)[:, None])
    expert = ModelScores(logp_N, torch.tensor([0, 1, 1, 0, 1]), None)
    return PairScores(gold_N, [0, 2, 5], base, (expert,))


def test_the_oracle_by_hand() -> None:
    asked = [Example("q", "a", "first"), Example("q", "a", "second")]
    row = _oracle(hand_made(), asked)
    assert (row["questions"], row["exact_match"], row["by_task"]) == (2, 0.5, {"first": 1.0, "second": 0.0})
    assert (row["deferral_rate"], row["expert_tokens"], row["tokens"]) == (2 / 5, 2, 5)
    row = _oracle(hand_made().of_examples([1]), asked[1:])
    assert (row["questions"], row["exact_match"], row["by_task"]) == (1, 0.0, {"second": 0.0})
    assert (row["deferral_rate"], row["expert_tokens"], row["tokens"]) == (1 / 3, 1, 3)


def test_scores_of_some_examples() -> None:
    some = hand_made().of_examples([1, 0])
    assert some.starts == [0, 3, 5]
    assert some.hidden_ND[:, 0].tolist() == [2, 3, 4, 0, 1]
    assert some.weak_labels().tolist() == [0, 0, 1, 0, 1]
    assert some.experts[0].hidden_ND is None


class FakeEngine:
    """Answers "ok" and stops, or, asked for more tokens than that has, goes on with it and never ends."""

    info = SimpleNamespace(vocabularies="same", lanes=[])

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def generate(self, requests: list[GenerationRequest], on_done: Callable[[Completion], None]) -> list[Completion]:
        found = []
        for request in requests:
            text, reason = ("ok", "stop") if request.prompt == [1] else ("ok, and so on", "length")
            found.append(Completion(request.request_id, [ord(c) for c in text], [0] * len(text), [], reason))
        for completion in found:
            on_done(completion)
        return found

    def shutdown(self) -> None:
        pass


def listening(asked: list[GenerationRequest], found: SimpleNamespace = FakeEngine.info) -> type[FakeEngine]:
    """An engine that writes down what it is asked.

    Args:
        found: what it says of itself.
    """

    class Listening(FakeEngine):
        info = found

        def generate(
            self, requests: list[GenerationRequest], on_done: Callable[[Completion], None]
        ) -> list[Completion]:
            asked.extend(requests)
            return super().generate(requests, on_done)

    return Listening


class Letters:
    """A tokenizer of code points."""

    def decode(self, tokens: list[int], **_: object) -> str:
        return "".join(map(chr, tokens))


def test_all_lanes_are_warm_before_anything_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the base alone is asked first, as calibration does; and no set finds its prompts read by another."""
    asked: list[GenerationRequest] = []

    info = SimpleNamespace(vocabularies="same", lanes=[None, None, None])
    monkeypatch.setattr("training.serving.Engine", listening(asked, info))
    config: Any = None
    questions = Questions([Example("p", "ok")], [TokenExample([1], [1])], 2)
    with Pair(config, Letters()) as pair:
        pair.answer(questions, "test", policy="never")
        pair.answer(questions, "test", policy="always")
    assert [request.collaboration.member for request in asked[:3]] == [0, 1, 2]
    assert [request.collaboration.policy for request in asked[3:]] == ["never", "never", "always"]
    assert len({request.sampling.cache_salt for request in asked[3:]}) == 3


def test_experts_with_vocabularies_of_their_own_are_asked_in_their_own_tokens(
    tiny: TinyProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[GenerationRequest] = []

    info = SimpleNamespace(
        vocabularies="spelled",
        lanes=[SimpleNamespace(tokenizer="unused"), SimpleNamespace(tokenizer=str(tiny.folder / "expert1"))],
    )
    monkeypatch.setattr("training.serving.Engine", listening(asked, info))
    own = tiny.project.tokenizer("say it")["input_ids"]
    config: Any = None
    with Pair(config, Letters()) as pair:
        questions = Questions([Example("say it", "ok")], [TokenExample([1], [0])], 20)
        pair.answer(questions, "test", policy="always")
        joint = asked[-1]
        pair.answer(questions, "test", member=1)
    assert (joint.prompt, joint.collaboration.prompts) == ([1], ((1, own),))
    assert (asked[-1].prompt, asked[-1].collaboration.prompts) == (own, ())


def test_of_several_samples_the_likeliest_counts_and_all_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[GenerationRequest]] = []

    class Sampling(FakeEngine):
        def generate(
            self, requests: list[GenerationRequest], on_done: Callable[[Completion], None]
        ) -> list[Completion]:
            """Of the samples, the second is the likeliest by its mean, though not by its sum."""
            calls.append(requests)
            text, logprob = ("ok", -0.1) if len(calls) == 3 else ("o", -0.15)
            entries = [TokenLogprobs([ord(c)], [logprob], 1) for c in text]
            tokens, sources, cost = [ord(c) for c in text], [0] * len(text), Cost(seconds=[1.0, 0.5])
            return [Completion(r.request_id, tokens, sources, [], "stop", entries, cost=cost) for r in requests]

    monkeypatch.setattr("training.serving.Engine", Sampling)
    config: Any = None
    questions = Questions([Example("one", "ok"), Example("two", "ok")], [TokenExample([1], [0])] * 2, 20)
    with Pair(config, Letters()) as pair:
        result = pair.answer(questions, "test", member=0, samples=3)
        plain = pair.answer(questions, "test", blend={"kind": "union", "weights": [[0, 0.5], [1, 0.5]]})
    _warm_up, *tries, blended = calls
    sampled = [request for each in tries for request in each]
    assert result.score == 1.0
    assert (result.expert_seconds, result.lane_seconds) == (3.0, 9.0)
    assert plain.expert_seconds == 1.0
    assert len({request.sampling.seed for request in sampled}) == 6
    assert {request.sampling.temperature for request in sampled} == {SAMPLE_TEMPERATURE}
    assert blended[0].collaboration.blend == Blend("union", ((0, 0.5), (1, 0.5)))
    assert blended[0].sampling.temperature == 0.0


def test_what_is_written_in_pieces_or_together_is_an_answer_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pieces(FakeEngine):
        def generate(
            self, requests: list[GenerationRequest], on_done: Callable[[Completion], None]
        ) -> list[Completion]:
            tokens, sources, texts = [NO_TOKEN] * 4, [1, BASE, BLEND, 1], [b"o\xc3", b"\xa4", b"k", b""]
            return [Completion(each.request_id, tokens, sources, [], "stop", texts=texts) for each in requests]

    monkeypatch.setattr("training.serving.Engine", Pieces)
    config: Any = None
    with Pair(config, Letters()) as pair:
        questions = Questions([Example("say it", "oäk")], [TokenExample([1], [0])], 20)
        result = pair.answer(questions, "test", strategy="characters")
    assert result.score == 1.0
    assert (result.expert_tokens, result.tokens) == (3, 4)


def test_an_answer_to_the_start_of_a_completion_may_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.serving.Engine", FakeEngine)
    asked = [
        (Example("ends", "ok"), 1, True),
        (Example("goes on", "ok"), 2, False),
        (Example("goes on", "ok", complete=False), 2, True),
        (Example("goes on", "ok.", complete=False), 2, False),
        (Example("ends", "ok", complete=False), 1, True),
    ]
    tokens = [TokenExample([prompt], [0]) for _, prompt, _ in asked]
    config: Any = None
    with Pair(config, Letters()) as pair:
        result = pair.answer(Questions([example for example, *_ in asked], tokens, 20), "test", policy="never")
    expected = [exact for *_, exact in asked]
    assert [answer.exact for answer in result.answers] == expected
    assert [answer.exact for answer in Result.from_json(json.loads(json.dumps(result.to_json()))).answers] == expected


def test_an_answer_is_exact_where_it_ended_with_the_gold() -> None:
    assert Answer("t", " x", " x", True, [0]).exact
    assert not Answer("t", " x", " x", False, [0]).exact
    assert not Answer("t", " xy", " x", True, [0]).exact


def test_the_gate_is_judged_where_somebody_may_be_asked() -> None:
    gold_N = torch.tensor([1, 1, 1, 1])
    base = ModelScores(torch.zeros(4), torch.tensor([0, 1, 0, 1]), None)
    expert = ModelScores(
        torch.zeros(4), torch.tensor([1, 1, -1, -1]), None, None, torch.tensor([True, True, False, False])
    )
    scores = PairScores(gold_N, [0, 4], base, (expert,))
    # Sure where the base errs and may ask; elsewhere it is as wrong as can be, which costs nobody anything.
    assert _tokens(scores, torch.tensor([2.0, 1.0, -5.0, 5.0])) == {"auroc_base_wrong": 1.0, "auroc_expert_needed": 1.0}
    shared = PairScores(gold_N, [0, 4], base, (replace(expert, aligned_N=None),))
    assert _tokens(shared, torch.tensor([2.0, 1.0, -5.0, 5.0]))["auroc_base_wrong"] == 0.25
