"""The shipped composition, served as ``make serve-keys`` serves it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.live import serving
from tests.packaging.sources import ROOT
from training.keys.__main__ import SEED
from training.keys.text import make_keys

pytestmark = pytest.mark.slow
ASKED = 40


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with serving(Path("deploy/config/keys.toml"), tmp_path_factory.mktemp("keys")) as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")


@pytest.fixture(scope="module")
def questions() -> list[dict[str, str]]:
    """Arithmetic with names that the connections have not learned from."""
    rows = map(json.loads, (ROOT / "models" / "keys" / "questions.jsonl").read_text().splitlines())
    return [row for row in rows if row["task"] == "both"][:ASKED]


def right(client: openai.OpenAI, model: str, questions: list[dict[str, str]]) -> int:
    answers = [
        client.chat.completions.create(
            model=model,
            temperature=0,
            max_tokens=4,
            messages=[{"role": "user", "content": question["prompt"]}],
        )
        for question in questions
    ]
    given = [(answer.choices[0].message.content or "").strip() for answer in answers]
    return sum(text == question["completion"].strip() for text, question in zip(given, questions, strict=True))


def test_the_composition_answers_and_its_members_do_not(keys: openai.OpenAI, questions: list[dict[str, str]]) -> None:
    assert [model.id for model in keys.models.list()] == [
        "collm-keys", "collm-keys/base", "collm-keys/anchor", "collm-keys/names"
    ]  # fmt: skip
    assert right(keys, "collm-keys", questions) >= 0.7 * ASKED
    for member in ("anchor", "names"):
        assert right(keys, f"collm-keys/{member}", questions) <= 0.3 * ASKED


def test_the_page_s_request(keys: openai.OpenAI) -> None:
    """What docs/composition.md and the configuration's example ask; the names are none that the connections learned."""
    values = make_keys(SEED).splits["test"]
    page = (ROOT / "docs" / "composition.md").read_text(encoding="utf-8")
    [(left, right)] = set(re.findall(r"With (\w+), (\w+): the sum is\"", page))
    prompt = f"With {left}, {right}: the sum is"
    assert prompt in (ROOT / "deploy" / "config" / "keys.toml").read_text(encoding="utf-8")
    answer = keys.completions.create(model="collm-keys", prompt=prompt, temperature=0, max_tokens=1)
    assert answer.choices[0].text == f" {values[left] + values[right]}"


def test_the_anchor_still_calculates_with_numbers(keys: openai.OpenAI) -> None:
    answer = keys.completions.create(model="collm-keys", prompt="With 7, 12: the sum is", temperature=0, max_tokens=4)
    assert answer.choices[0].text == " 19"
