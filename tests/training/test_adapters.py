"""LoRA adapters of the base as experts: scored in the base's weights, exported as guests of its lane."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from engine.config import OF_BASE, EngineConfig
from tests.training.builders import TinyProject
from training import graph
from training.checkpoints import check_models, forward, load_causal
from training.errors import ModelError, SettingsError
from training.settings import load_settings
from training.stages import calibrate, export, train
from training.stages.score import score_split

CPU = torch.device("cpu")


@pytest.fixture
def adapted(tiny: TinyProject) -> TinyProject:
    """The tiny project with an adapter as its expert, whose matrices change much."""
    torch.manual_seed(3)
    fields = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(load_causal(tiny.folder / "base", "float32", CPU), fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)
    model.save_pretrained(tiny.folder / "adapter")
    tiny.content["experts"] = [{"name": "e1", "adapter": str(tiny.folder / "adapter")}]
    tiny.content["engine"] = {"vllm": {"dtype": "float32"}}
    return tiny


def test_scores_are_those_of_peft(adapted: TinyProject) -> None:
    project = adapted.project
    scores = score_split(project, "train")
    whole = PeftModel.from_pretrained(load_causal(project.base, "float32", CPU), str(adapted.folder / "adapter"))
    example = project.data("train").tokens[0]
    ids = example.prompt + example.completion
    with torch.no_grad():
        _, logits_BTV = forward(whole.base_model.model.eval(), torch.tensor([ids]))
    for row, gold in enumerate(example.completion):
        at = len(example.prompt) - 1 + row
        expected = torch.log_softmax(logits_BTV[0, at, :257], -1)[gold]
        torch.testing.assert_close(scores.experts[0].logp_N[row], expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(scores.experts[0].logp_N, scores.base.logp_N, atol=0.1)


def test_other_weights_below_an_adapter_are_another_expert(adapted: TinyProject) -> None:
    before = graph.scores(adapted.project, "train", "e1").fingerprint
    file = adapted.folder / "base" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"note": 1}))
    assert graph.scores(adapted.project, "train", "e1").fingerprint != before


@pytest.mark.usefixtures("fake_pair")
@pytest.mark.parametrize("mode", ["gate", "joint"])
def test_the_exported_pair(adapted: TinyProject, mode: str) -> None:
    """A trained base is not what the adapter is of: there it keeps the weights it came for, in a lane of its own."""
    pytest.importorskip("matplotlib")
    adapted.content["train"] |= {"mode": mode}
    project = adapted.project
    for stage in (train, calibrate, export):
        stage.run(project)
    config = EngineConfig.model_validate(tomllib.loads(project.folder("pair", "collm.toml").read_text("utf-8")))
    expert = config.experts[0]
    assert expert.adapter == str(adapted.folder / "adapter")
    if mode == "gate":
        assert (expert.model, config.hosts) == (OF_BASE, (0, 0))
    else:
        assert (expert.model, config.hosts) == (str(adapted.folder / "base"), (0, 1))
        assert config.base.model != expert.model
        assert expert.vllm == {"dtype": "float32"}


def test_what_does_not_fit_is_found_before_anything_runs(adapted: TinyProject, tmp_path: Path) -> None:
    check_models(adapted.project.settings)
    file = adapted.folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": True}))
    with pytest.raises(ModelError, match="is a DoRA adapter"):
        check_models(adapted.project.settings)
    adapted.content["engine"]["lanes"] = {"e1": {"executor": "uni"}}
    with pytest.raises(SettingsError, match=r"engine\.lanes\.e1: an adapter computes in the base's lane"):
        load_settings(adapted.write())
    adapted.content["engine"].pop("lanes")
    adapted.content["experts"][0]["model"] = str(adapted.folder / "expert1")
    with pytest.raises(SettingsError, match="give either model or adapter"):
        load_settings(adapted.write())
