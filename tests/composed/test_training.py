"""Training a composition: only its connections learn, and what is saved computes what was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.composed.artifact import TENSORS_FILE, Composition, Connection, Heads, make_member
from engine.errors import CollmError
from tests.composed import one_lane
from tests.composed.checkpoints import PLANS, save_member
from tests.composed.reference import Reference
from tests.packaging.sources import ROOT
from training.checkpoints import check_models, load_causal
from training.compose import learn
from training.compose.__main__ import run_stage
from training.compose.learn import new_model, planned
from training.compose.settings import ComposeSettings, ConnectSettings
from training.compose.stages import folded, table
from training.engine_options import vllm_version
from training.errors import SettingsError
from training.files import write_json
from training.settings import Settings, read_settings

WORDS = ("red", "green", "blue", "black")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A configuration of two tiny members, with data that the connections can learn."""
    save_member(tmp_path / "anchor", "llama", layers=3, width=64, seed=1, initializer_range=0.05)
    save_member(tmp_path / "facts", "qwen2", layers=2, width=64, seed=2, initializer_range=0.05)
    lines = [{"prompt": f"{n} is", "completion": WORDS[n % 4]} for n in range(32)]
    for split, chosen in {"train": lines, "validation": lines[:8], "test": lines[:4]}.items():
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, chosen)))
    (tmp_path / "compose.toml").write_text(f"""
out = "{tmp_path}/out"
anchor.model = "{tmp_path}/anchor"
augmenting = [{{ name = "facts", model = "{tmp_path}/facts" }}]
data.train = "{tmp_path}/train.jsonl"
data.validation = "{tmp_path}/validation.jsonl"
data.test = "{tmp_path}/test.jsonl"
connect = {{ normalize = true }}
compute = {{ threads = 1 }}
train = {{ epochs = 6, batch_size = 8, learning_rate = 1e-2, evaluate_every = 4 }}
evaluate = {{ controls = ["random", "lora"] }}
engine = {{ backend = "bench.standin" }}
""")
    return tmp_path / "compose.toml"


def plan_and_members(folder: Path) -> tuple[Composition, Any, dict[str, Any]]:
    found = Composition.load(folder)
    return found, load_causal(found.anchor.path), {m.name: load_causal(m.path) for m in found.augmenting}


@pytest.mark.parametrize("name", PLANS)
def test_before_training_it_is_the_anchor(name: str, composed: Callable[[str], Path]) -> None:
    """Bit for bit, in every logit."""
    found, anchor, augmenting = plan_and_members(composed(name))
    tokens = torch.tensor([one_lane.prompts()[0]])
    with torch.no_grad():
        want = anchor(input_ids=tokens, use_cache=False).logits
        assert torch.equal(new_model(found, anchor, augmenting, seed=0)(input_ids=tokens).logits, want)


@pytest.mark.parametrize("name", PLANS)
def test_future_tokens_change_nothing(name: str, composed: Callable[[str], Path]) -> None:
    """In training too: what the composition learns from a text it can do when it writes one."""
    found, anchor, augmenting = plan_and_members(composed(name))
    model = new_model(found, anchor, augmenting, seed=0)
    with torch.no_grad():
        for connection in model.connections:
            torch.nn.init.normal_(connection.output.weight, std=0.3)
        text = one_lane.prompts()[-1][:30]
        changed = [*text[:15], *reversed(text[15:])]
        first, second = (model(input_ids=torch.tensor([ids])).logits[0] for ids in (text, changed))
    assert torch.equal(first[:15], second[:15])
    assert not torch.equal(first[15:], second[15:])


@pytest.mark.parametrize("name", PLANS)
def test_what_is_read_back_is_the_oracle(name: str, composed: Callable[[str], Path]) -> None:
    """Scoring, and the training of a gate, see the model that is served."""
    text = one_lane.prompts()[2]
    with torch.no_grad():
        got = load_causal(composed(name))(input_ids=torch.tensor([text]), use_cache=False).logits[0]
    assert torch.allclose(got, Reference(composed(name)).logits(text), atol=1e-3)


def test_folding_changes_nothing(composed: Callable[[str], Path], tmp_path: Path) -> None:
    found, anchor, augmenting = plan_and_members(composed("llama reads qwen2"))
    model = new_model(found, anchor, augmenting, seed=0)
    for connection in model.connections:
        torch.nn.init.normal_(connection.output.weight, std=0.02)
    found.save(tmp_path / "model", folded(model))
    text = one_lane.prompts()[2]
    with torch.no_grad():
        trained = model(input_ids=torch.tensor([text])).logits[0]
    assert torch.allclose(trained, Reference(tmp_path / "model").logits(text), atol=1e-3)


def test_pipeline(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = {name: load_causal(project.parent / name).state_dict() for name in ("anchor", "facts")}
    files = {file: file.read_bytes() for name in members for file in (project.parent / name).iterdir()}
    run_stage("pipeline", project, [])
    runs = project.parent / "out" / "train"
    losses = json.loads((runs / "composed-0" / "looks.json").read_text())
    assert min(losses.values()) < 0.8 * losses["0"], "the connections have learned nothing"
    found = Composition.load(runs / "composed-0" / "model")
    found.check()
    assert found.connections == (Connection("facts", 1, 1), Connection("facts", 2, 2))
    # Members are frozen: on disk, and in what the composition computes with.
    assert {file: file.read_bytes() for file in files} == files
    loaded: Any = load_causal(runs / "composed-0" / "model")
    for name, state in members.items():
        model = loaded.anchor if name == "anchor" else loaded.augmenting[0]
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    random = Composition.load(runs / "random-0" / "model")
    assert random.augmenting[0].path == runs / "random-0" / "random-facts"
    unlearned = load_causal(random.augmenting[0].path).state_dict()
    assert not any(
        torch.equal(unlearned[key], state) for key, state in members["facts"].items() if "proj.weight" in key
    )
    assert (runs / "lora-0" / "model" / "model.safetensors").is_file()
    parameters = {
        name: json.loads((runs / f"{name}-0" / "done.json").read_text())["parameters"] for name in ("composed", "lora")
    }
    # Nothing else has learned: f, W_Q, W_K, W_V and W_O of two connections, all of the members' width.
    assert parameters["composed"] == 2 * 5 * 64 * 64
    assert parameters["lora"] == pytest.approx(parameters["composed"], rel=0.5)
    rows = json.loads((project.parent / "out" / "evaluate" / "table.json").read_text())
    assert set(rows) == {"composed", "random", "lora", "anchor alone", "facts alone", "either member alone"}
    alone = [rows[f"{member} alone"][0]["exact_match"] for member in ("anchor", "facts")]
    assert max(alone) <= rows["either member alone"][0]["exact_match"] <= sum(alone)
    assert table(rows) in capsys.readouterr().out
    # Everything is there: nothing is trained again.
    before = (runs / "composed-0" / "done.json").stat().st_mtime_ns
    run_stage("pipeline", project, [])
    assert (runs / "composed-0" / "done.json").stat().st_mtime_ns == before


def test_an_interrupted_training_goes_on(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["train.checkpoint_every=3", "evaluate.controls=[]"]
    run_stage("train", project, overrides)
    runs = project.parent / "out" / "train"
    whole = (runs / "composed-0" / "model" / "composition.safetensors").read_bytes()
    again = [*overrides, f"out={project.parent}/again"]
    logp, calls = learn._logp, iter(range(10**6))

    def interrupted(*arguments: Any) -> torch.Tensor:
        if next(calls) == 15:
            raise KeyboardInterrupt
        return logp(*arguments)

    monkeypatch.setattr(learn, "_logp", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_stage("train", project, again)
    assert (project.parent / "again" / "train" / "composed-0" / "checkpoint.safetensors").is_file()
    run_stage("train", project, again)
    assert (
        project.parent / "again" / "train" / "composed-0" / "model" / "composition.safetensors"
    ).read_bytes() == whole


def test_training_stops_when_nothing_gets_better(project: Path) -> None:
    overrides = ["train.learning_rate=1e-12", "train.patience=2", "train.evaluate_every=1", "evaluate.controls=[]"]
    run_stage("train", project, overrides)
    looks = json.loads((project.parent / "out" / "train" / "composed-0" / "looks.json").read_text())
    assert len(looks) < 24


def test_what_is_saved_is_what_did_best(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def loss(looks: learn._Looks) -> float:
        (output,) = (weight for name, weight in looks._learned.items() if name.endswith("0.output.weight"))
        seen.append(output.detach().clone())
        return (3.0, 1.0, 2.0)[min(len(seen), 3) - 1]

    monkeypatch.setattr(learn._Looks, "_loss", loss)
    run_stage("train", project, ["train.patience=2", "train.evaluate_every=1", "evaluate.controls=[]"])
    assert len(seen) > 3
    model = project.parent / "out" / "train" / "composed-0" / "model"
    saved = load_file(str(model / TENSORS_FILE))["connections.0.output.weight"]
    assert torch.equal(saved, seen[1])
    assert not torch.equal(saved, seen[-1])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("connect.heads=3", "connect.heads: 3 does not divide the anchor's hidden size, 64"),
        ("connect.connections=[{augmenting='facts', layer=9, into=1}]", "connections.layer: 9 is not in 1..2"),
        ("connect.connections=[{augmenting='who', layer=1, into=1}]", "there is no augmenting model 'who'"),
        ("connect.kv_heads=3", "connect.kv_heads: 3 does not divide heads, 2"),
        ("connect.connections=[{augmenting='facts', layer=1, into=4}]", "connect.connections.into: 4 is not in 1..3"),
        ("train.rate=1", "train.rate: no such setting"),
        ("seeds=[18446744073709551616]", "seeds.0: Input should be less than 4294967296"),
        ("compute.dtype=bfloat16", "compute.dtype: connections learn in float32"),
        ("compute.device=nothing", "compute.device: nothing"),
        ("data.chat_templates=own", "data.chat_templates: all members read the same tokens"),
        ("engine.lanes.facts.vllm={dtype='float32'}", "engine.lanes: the composition and its members are asked"),
        ("engine.tensor_parallel_size=2", "engine, lane 'anchor'"),
        ("anchor.model=nowhere", "nowhere"),
    ],
)
def test_wrong_settings(project: Path, override: str, message: str) -> None:
    with pytest.raises(CollmError) as caught:
        run_stage("train", project, [override])
    assert message in str(caught.value)


def test_the_engine_s_options_are_looked_at_before_training(project: Path) -> None:
    write_json(project.parent / "out" / f"options-of-vllm-{vllm_version()}.json", ["dtype"])
    with pytest.raises(SettingsError, match="dtyp: vLLM has no such engine option; did you mean 'dtype'"):
        run_stage("train", project, ["engine.backend=vllm", "engine.vllm={dtyp='float32'}"])
    assert not (project.parent / "out" / "train").exists()


def test_connections_by_hand(project: Path) -> None:
    members = [make_member(name, project.parent / name) for name in ("anchor", "facts")]
    settings = ComposeSettings.model_validate(
        {
            "out": "out",
            "anchor": {"model": "a"},
            "augmenting": [{"name": "facts", "model": "f"}],
            "data": {"train": "t", "validation": "v"},
            "connect": {"connections": [{"augmenting": "facts", "layer": 2, "into": 3}], "heads": 4, "kv_heads": 1},
        }
    )
    found = planned(settings, members[0], members[1:])
    assert found.connections == (Connection("facts", 2, 3),)
    assert found.heads == Heads(4, 1, 16)
    many = settings.model_copy(update={"connect": ConnectSettings(count=50)})
    with pytest.raises(SettingsError, match=r"connect\.count: of 50 connections some would read and write the same"):
        planned(many, members[0], members[1:])


def test_a_composed_base_is_not_trained_with_its_gate(composed: Callable[[str], Path]) -> None:
    folder = composed("llama reads qwen2")
    settings: dict[str, Any] = {
        "out": "out",
        "base": {"model": str(folder)},
        "experts": [{"name": "other", "model": str(folder.parent / "other")}],
        "data": {"train": "t", "validation": "v"},
    }
    check_models(Settings.model_validate(settings))
    with pytest.raises(CollmError, match="is a composed checkpoint"):
        check_models(Settings.model_validate(settings | {"train": {"mode": "joint"}}))


@pytest.mark.parametrize(("name", "models"), [("compose-demo", "models/demo")])
def test_the_shipped_configuration_is_valid(name: str, models: str) -> None:
    """With the members that are shipped."""
    settings = read_settings(ComposeSettings, ROOT / "deploy" / "training" / f"{name}.toml", [])
    anchor = "base" if name == "compose-demo" else "anchor"
    members = [make_member(model.name, ROOT / models / model.name) for model in settings.augmenting]
    found = planned(settings, make_member("anchor", ROOT / models / anchor), members)
    found.check_fields(settings.out)
