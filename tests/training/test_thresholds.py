"""The choice of a threshold among points that differ by less than their noise, on a scale that does not saturate."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.training.builders import TinyProject, examples, write_jsonl
from training.__main__ import main
from training.thresholds import LOG_ODDS, Point, choose, probability, quantile, reach, remarks, within_noise

pytest.importorskip("matplotlib")


def point(right: str, rate: float, threshold: float = 0.0) -> Point:
    """``right``: a letter for each question, "x" where its answer is right."""
    answers = tuple(letter == "x" for letter in right)
    return Point(rate, threshold, sum(answers) / len(answers), rate, right=answers)


BEST = point("xxxxxxxxxxxxxxxxxxxxxx--", 0.8, -1.0)


@pytest.mark.parametrize(
    ("right", "noise", "within"),
    [
        ("xxxxxxxxxxxxxxxxxxxxx---", 1.0, True),  # one question in 24 is its own standard error
        ("xxxxxxxxxxxxxxxxxxxxx---", 0.5, False),
        ("xxxxxxxxxxxxxxxxxxx-----", 1.0, False),  # three, all to one side: between one and two
        ("xxxxxxxxxxxxxxxxxxx-----", 2.0, True),
        ("---xxxxxxxxxxxxxxxxxxxxx", 1.0, True),  # three lost and two won, which is nothing
        ("xxxxxxxxxxxxxxxxxxxxxx--", 0.0, True),
        ("xxxxxxxxxxxxxxxxxxxxx---", 0.0, False),
    ],
)
def test_noise_is_that_of_the_paired_difference(right: str, noise: float, within: bool) -> None:
    assert within_noise(point(right, 0.1), BEST, noise) == within


def test_of_points_that_are_as_good_the_cheapest_is_chosen() -> None:
    cheap, cheaper = point("xxxxxxxxxxxxxxxxxxxxx---", 0.4, 1.0), point("xxxxxxxxxxxxxxxxxx------", 0.1, 2.0)
    observed = torch.tensor([-2.0, 0.5, 1.7, 3.0])
    tried: list[float] = []

    def decode(threshold: float) -> Point:
        tried.append(threshold)
        return point("xxxxxxxxxxxxxxxxxxxxx---", 0.4, threshold) if threshold < 1.9 else cheaper

    chosen = choose([BEST, cheap, cheaper], observed, decode, noise=1.0, bounds=LOG_ODDS)
    assert chosen.deferral_rate == 0.4
    # In the middle between the observed values around it.
    assert tried == [pytest.approx((0.5 + 1.7) / 2)]
    assert choose([BEST, cheap, cheaper], observed, decode, noise=3.0, bounds=LOG_ODDS).deferral_rate == 0.1
    assert choose([BEST, cheap, cheaper], observed, lambda _: BEST, noise=0.0, bounds=LOG_ODDS).deferral_rate == 0.8


def test_rates_of_a_sure_gate_can_all_be_had() -> None:
    """Log-odds of -38 to 35, as a real base's gate had them: in float32 a third of these probabilities are 1."""
    observed = torch.linspace(-38, 35, 1001, dtype=torch.float64)
    assert float((torch.sigmoid(observed.float()) == 1).double().mean()) > 0.2
    rates = [number / 20 for number in range(1, 20)]
    thresholds = [quantile(observed, rate, LOG_ODDS) for rate in rates]
    assert len(set(map(probability, thresholds))) == len(rates)
    served = torch.tensor([probability(value) for value in observed.tolist()], dtype=torch.float64)
    for rate, threshold in zip(rates, thresholds, strict=True):
        assert float((served > probability(threshold)).double().mean()) == pytest.approx(rate, abs=0.002)


def test_log_odds_as_probabilities() -> None:
    assert probability(0.0) == 0.5
    assert probability(math.log(3)) == pytest.approx(0.75)
    assert (probability(math.inf), probability(-math.inf)) == (1.0, -1.0)
    assert 0 < probability(LOG_ODDS.least) < probability(LOG_ODDS.greatest) < 1
    assert quantile(torch.tensor([50.0, 60.0]), 0.5, LOG_ODDS) == LOG_ODDS.greatest


def test_a_wished_rate_is_come_near_to_in_a_few_steps() -> None:
    def decode(threshold: float) -> Point:
        return Point(0.0, threshold, 0.0, 1 / (1 + math.exp(threshold / 3)))

    swept = [decode(threshold) for threshold in (-math.inf, -20.0, 0.0, 20.0, math.inf)]
    assert reach(swept, 0.2, decode, LOG_ODDS).deferral_rate == pytest.approx(0.2, abs=0.02)


def test_remarks_name_rates_that_cannot_be_had() -> None:
    swept = [
        Point(rate, 0.5 if 0 < rate < 0.5 else rate, 0.0, 0.6 if rate else 0.0) for rate in (0, 0.1, 0.2, 0.4, 0.9)
    ]
    assert remarks(swept, swept) == [
        "5 nominal rates have 3 thresholds: the gate has the same value for many tokens",
        "no measured deferral rate is between 0.00 and 0.60",
    ]
    even = [Point(rate, rate, 0.0, rate) for rate in (0, 0.2, 0.4, 0.6, 0.8, 1.0)]
    assert remarks(even, even) == []


@pytest.mark.usefixtures("fake_pair")
def test_the_cheapest_of_equals_is_served_and_compared(tiny: TinyProject) -> None:
    """The made-up pair is best at a rate of 0.4; of 20 questions, a rate of 0.35 loses one, which is its noise."""
    for number, split in enumerate(("validation", "test")):
        write_jsonl(tiny.folder / f"{split}.jsonl", examples(20, number))
    tiny.content["calibrate"]["rates"] = [number / 20 for number in range(21)]
    config = ["--config", str(tiny.write())]
    assert main(["pipeline", *config]) == 0
    done = tiny.folder / "out" / "calibrate" / "collm-0" / "done.json"
    rates = []
    for noise in ("1.0", "0"):
        assert main(["calibrate", *config, "--set", f"calibrate.noise={noise}"]) == 0
        rates.append(json.loads(done.read_text())["deferral_rate"])
    assert rates[0] < rates[1]
    rates = []
    for noise in ("3.0", "0"):
        assert main(["evaluate", *config, "--set", f"calibrate.noise={noise}"]) == 0
        rows = json.loads((tiny.folder / "out" / "evaluate" / "table.json").read_text())["rows"]
        rates.append(rows["confidence, own threshold"]["0"]["deferral_rate"])
    assert rates[0] < rates[1]


def test_no_right_answer_chooses_no_threshold_in_silence(tiny: TinyProject, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pipeline", "--config", str(tiny.write())]) == 0
    curve = json.loads((tiny.folder / "out" / "calibrate" / "collm-0" / "curve.json").read_text())
    assert all(point["score"] == 0 for point in curve["points"])
    assert curve["threshold"] == 0.5
    assert any("no answer is right at any threshold" in warning for warning in curve["warnings"])
    assert "warning: " in capsys.readouterr().out


@pytest.mark.usefixtures("fake_pair")
def test_a_missed_rate_is_said(
    tiny: TinyProject, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("tests.training.builders", fromlist=["RATES"]).RATES, "threshold", lambda _: 0.9)
    config = ["--config", str(tiny.write())]
    assert main(["pipeline", *config]) == 0
    capsys.readouterr()
    assert main(["calibrate", *config, "--set", "calibrate.target_rate=0.2"]) == 0
    said = capsys.readouterr().out
    assert "calibrate.target_rate 0.2 is missed: the nearest rate that a threshold gave is 0.00" in said
    assert "no measured deferral rate is between 0.00 and 0.90" in said
