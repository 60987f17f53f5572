"""Pairs of strangers as ``collm check`` sees them: what a start would say of them, and nothing is loaded."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Gemma3Config, Gemma3TextConfig

from engine.check import report
from engine.checkpoints import Checkpoint
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.vllm_hooks.load import make_plan
from tests.oracle import families
from tests.oracle.families import PADDED, VOCABULARY
from tests.oracle.pairs import save_tokenizer

BY_NAME = {family.name: family for family in families.FAMILIES}


def save(directory: Path, family: str = "Llama", rows: int = VOCABULARY, **fields: Any) -> Path:
    """A random model of so many outputs with the tests' tokenizer."""
    of_family = BY_NAME[family]
    settings = of_family.settings | ({} if "vocab_size" in of_family.settings else {"vocab_size": rows})
    of_family._replace(settings=settings).make(len(directory.name)).save_pretrained(directory)
    save_tokenizer(directory, VOCABULARY)
    edit(directory / "config.json", lambda config: config.update(fields))
    return directory


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def add_tokens(directory: Path, count: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"extra_special_tokens": [f"<|added{number}|>" for number in range(count)]})
    tokenizer.save_pretrained(directory)


def config(base: Path | str, expert: Path | str, **vllm: Any) -> EngineConfig:
    lane = {"vllm": {"dtype": "float32", "max_model_len": 128, **vllm}}
    return EngineConfig.model_validate(
        {"base": {"model": str(base), **lane}, "experts": [{"name": "expert", "model": str(expert), **lane}]}
    )


def said(pair: EngineConfig) -> dict[str, str]:
    """The report's lines by what each is about; the first of several."""
    found: dict[str, str] = {}
    for line in report(pair):
        about, _, rest = line.partition(": ")
        found.setdefault(about, rest)
    return found


@pytest.mark.parametrize("whose", ["base", "expert"])
@pytest.mark.parametrize("count", [1, 16, 17])
def test_added_tokens_are_masked(count: int, whose: str, tmp_path: Path) -> None:
    """As CodeLlama (16), Llemma and Meditron (17) have them beside Llama-2."""
    members = {name: save(tmp_path / name, rows=VOCABULARY + count * (name == whose)) for name in ("base", "expert")}
    add_tokens(members[whose], count)
    lines = said(config(**members))
    assert f"{VOCABULARY + count} tokens, {VOCABULARY + count} outputs" in lines[whose]
    assert lines["vocabulary"].startswith("one; ")
    plan = make_plan(config(**members))
    lane = int(whose == "expert")
    assert plan.shared.masked(lane) == [(VOCABULARY, VOCABULARY + count)]
    assert plan.shared.masked(1 - lane) == []
    (note,) = [line for line in plan.notes(["base", "expert"]) if line.startswith("vocabulary: ")]
    assert re.search(rf"\b{count}\b", note), note
    assert "<|added0|>" in note


def test_a_special_token_under_another_name(tmp_path: Path) -> None:
    """As between Llama-3 and 3.1, Qwen2.5 and its Coder, or the R1 distillates."""
    members = {name: save(tmp_path / name) for name in ("base", "expert")}
    for name, path in members.items():
        edit(
            path / "tokenizer.json",
            lambda content, name=name: content["added_tokens"].append(
                {**content["added_tokens"][0], "id": 511, "content": f"<|reserved_{name}|>"}
            ),
        )
    assert said(config(**members))["vocabulary"].startswith("one; ")
    plan = make_plan(config(**members))
    assert plan.shared.masked(0) == plan.shared.masked(1) == [(511, 512)]


def test_padding_of_different_widths(tmp_path: Path) -> None:
    """As 151,936 outputs beside 152,064."""
    base, expert = save(tmp_path / "base", rows=PADDED), save(tmp_path / "expert", rows=PADDED + 32)
    plan = make_plan(config(base, expert))
    assert plan.shared.masked(0) == [(VOCABULARY, PADDED)]
    assert plan.shared.masked(1) == [(VOCABULARY, PADDED + 32)]


def test_one_row_more_is_no_gate_unless_it_is_said(tmp_path: Path) -> None:
    base, expert = save(tmp_path / "base", rows=VOCABULARY + 1), save(tmp_path / "expert")
    pair = config(base, expert)
    assert make_plan(pair).gate is None
    assert said(pair)["gate"].startswith("none; ")
    fields = pair.model_dump() | {"gate": {"in_lm_head": True}}
    gate = make_plan(EngineConfig.model_validate(fields)).gate
    assert gate is not None
    assert gate.source == "lm_head"


@pytest.mark.parametrize("family", ["GPT-2", "OPT", "Mixtral", "Qwen3, padded", "Falcon-H1"])
def test_families(family: str, tmp_path: Path) -> None:
    """Under names of their own for what config.json says; as base and as expert."""
    one, llama = save(tmp_path / "one", family), save(tmp_path / "llama")
    rows = PADDED if "padded" in family else VOCABULARY
    width = 64 if family == "OPT" else 128
    of_one = f"{VOCABULARY} tokens, {rows} outputs, LM head reads {width}; "
    of_llama = f"{llama}: llama, {VOCABULARY} tokens, {VOCABULARY} outputs, LM head reads 128; "
    for pair, name, other in ((config(one, llama), "base", "expert"), (config(llama, one), "expert", "base")):
        lines = said(pair)
        assert lines[name].startswith(f"{one}: ")
        assert of_one in lines[name]
        assert lines[other].startswith(of_llama)
        assert "MiB of weights, KV cache: " in lines[name]
        assert lines["ends of text"] == "0 '<|endoftext|>'"


def test_a_multimodal_wrapper(tmp_path: Path) -> None:
    """Its text model's fields are nested."""
    text = BY_NAME["Gemma-3"]
    merged = {key: value for key, value in (families.COMMON | text.settings).items() if value is not ...}
    wrapper = save(tmp_path / "wrapper", "Gemma-3")
    nested = Gemma3Config(text_config=Gemma3TextConfig(**merged)).to_dict()
    nested["architectures"] = ["Gemma3ForConditionalGeneration"]
    assert "vocab_size" not in nested
    (wrapper / "config.json").write_text(json.dumps(nested))
    lines = said(config(save(tmp_path / "base"), wrapper))
    assert f"{VOCABULARY} tokens, {VOCABULARY} outputs, LM head reads 128" in lines["expert"]


def test_names_on_a_hub_with_a_revision_and_a_tokenizer_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache as huggingface_hub lays it out: the revision that is served is the one that is looked at."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    home = tmp_path / "models--house--pair"
    for revision, rows in (("old", VOCABULARY), ("new", PADDED)):
        save(home / "snapshots" / revision, rows=rows)
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / revision).write_text(revision)
    shutil.copytree(home / "snapshots" / "old", tmp_path / "models--house--words" / "snapshots" / "main")
    (tmp_path / "models--house--words" / "refs").mkdir()
    (tmp_path / "models--house--words" / "refs" / "main").write_text("main")
    add_tokens(tmp_path / "models--house--words" / "snapshots" / "main", 3)
    rows = [Checkpoint.find("house/pair", {"revision": revision}).rows for revision in ("old", "new")]
    assert rows == [VOCABULARY, PADDED]
    served = Checkpoint.find("house/pair", {"revision": "new", "tokenizer": "house/words"})
    assert (served.rows, len(served.vocabulary)) == (PADDED, VOCABULARY + 3)
    with pytest.raises(
        ConfigError, match="house/nowhere: no such folder, and it could not be downloaded from a model hub"
    ):
        make_plan(config(home / "snapshots" / "old", "house/nowhere"))


def test_moved_words_and_foreign_tokenizers_are_told(tmp_path: Path) -> None:
    """Ordinary tokens that differ: each member has a vocabulary of its own then, which the report says."""
    base, expert = save(tmp_path / "base"), save(tmp_path / "expert")
    words = Tokenizer.from_file(str(expert / "tokenizer.json")).get_vocab()
    edit(
        expert / "tokenizer.json",
        lambda content: content["model"]["vocab"].update({"a": words["b"], "b": words["a"]}),
    )
    lines = list(report(config(base, expert)))
    assert any(line.startswith("vocabularies: each member has its own") for line in lines)
    assert any("2 entries differ" in line and "'a'" in line for line in lines), lines
