"""New facts by exchanging the expert: base and gate stay, the answers change."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig, ExpertConfig, GateConfig, LaneConfig
from engine.offline import Engine
from engine.types import GenerationRequest, SamplingSpec
from training.checkpoints import load_tokenizer

pytest.importorskip("pycountry")

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "models" / "demo"


def test_changed_codes_have_the_same_shape_and_belong_to_nobody() -> None:
    from training.demo.changed import changed_entities
    from training.demo.corpus import Corpus

    corpus = Corpus.make(0)
    before = {entity.name: entity for entity in corpus.splits["test"]}
    taken = {code for entity in corpus.entities for code in entity.codes.values()}
    changed = changed_entities(corpus)
    assert len({entity.name for entity in changed}) == 10
    for entity in changed:
        old = before[entity.name]
        assert entity.codes.keys() == old.codes.keys()
        for field, code in entity.codes.items():
            assert code not in taken
            assert [(c.isdigit(), c.isupper()) for c in code] == [(c.isdigit(), c.isupper()) for c in old.codes[field]]
    assert changed_entities(corpus) == changed


def answers(expert: Path, prompts: list[str]) -> list[str]:
    tokenizer = load_tokenizer(DEMO / "base")
    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True}
    lane: dict[str, Any] = {"vllm": options, "kv_cache_memory_bytes": 64 << 20}
    experts = {"codes": expert, "arithmetic": DEMO / "arithmetic"}
    config = EngineConfig(
        base=LaneConfig(model=str(DEMO / "base"), **lane),
        experts=tuple(ExpertConfig(name=name, model=str(path), **lane) for name, path in experts.items()),
        gate=GateConfig(path=str(DEMO / "gate")),
    )
    sampling = SamplingSpec(temperature=0.0, max_tokens=80)
    requests = [GenerationRequest(str(n), tokenizer(prompt)["input_ids"], sampling) for n, prompt in enumerate(prompts)]
    with Engine(config) as engine:
        completions = engine.generate(requests)
    return [tokenizer.decode(completion.tokens, skip_special_tokens=True) for completion in completions]


@pytest.mark.slow
def test_the_answers_follow_the_expert(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training.demo.changed", "--pair", str(DEMO), "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    asked = json.loads((tmp_path / "questions.json").read_text())
    prompts = [question["prompt"] for question in asked]
    new = [question["completion"] for question in asked]
    before, after = answers(DEMO / "codes", prompts), answers(tmp_path / "codes", prompts)
    assert sum(text == gold for text, gold in zip(before, new, strict=True)) == 0
    share = sum(text == gold for text, gold in zip(after, new, strict=True)) / len(new)
    assert share >= 0.8
