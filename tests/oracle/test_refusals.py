"""What does not fit refuses to start, with one line that names it.

Where nothing has to be loaded for that, the function is asked that the engine's process asks first; that what it says
reaches the user is shown in ``tests/robustness/test_startup.py``.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import CollmError, EngineStartupError
from engine.offline import Engine
from engine.regret import RegretArtifact
from engine.vllm_hooks.load import make_plan
from engine.vllm_hooks.options import engine_arguments
from tests.oracle import pairs


def _refusal(config: EngineConfig) -> str:
    with pytest.raises(EngineStartupError) as caught, Engine(config):
        pass
    message = str(caught.value)
    assert "\n" not in message
    return message


def _misfit(config: EngineConfig) -> str:
    """What is said of checkpoints and gate before anything is loaded."""
    with pytest.raises(CollmError) as caught:
        make_plan(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def copy(random_pair: pairs.Served, tmp_path: Path) -> pairs.Served:
    """The random pair in files that may be changed."""
    shutil.copytree(random_pair.base.parent, tmp_path / "pair")
    moved = {name: tmp_path / "pair" / name for name in random_pair.experts}
    return pairs.Served(
        tmp_path / "pair" / "base", moved, tmp_path / "pair" / "gate", random_pair.reference, random_pair.max_model_len
    )


def test_vocabulary_mismatch_names_the_entries(copy: pairs.Served) -> None:
    """The base's tokenizer has no decoder, so that nobody knows what its tokens are in another's text."""
    base = copy.base / "tokenizer.json"
    base.write_text(json.dumps(json.loads(base.read_text()) | {"decoder": None}))
    file = copy.experts["expert1"] / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["<filler3>"], vocabulary["<filler4>"] = vocabulary["<filler4>"], vocabulary["<filler3>"]
    vocabulary["surprise"] = vocabulary.pop("<filler9>")
    file.write_text(json.dumps(tokenizer))
    message = _misfit(copy.config())
    assert message.startswith("experts.expert1.model: base and expert do not share a vocabulary; 4 entries differ: ")
    for name in ("<filler3>", "<filler4>", "<filler9>", "surprise"):
        assert name in message


def test_gate_of_another_hidden_size(copy: pairs.Served, tmp_path: Path) -> None:
    other = pairs.random_pair(tmp_path / "other")
    config = copy.config().model_dump()
    config["base"]["model"] = str(other.experts["expert1"])  # hidden size 192, the gate is for 128
    assert "hidden size 128, the base has 192" in _misfit(EngineConfig.model_validate(config))


def test_gate_for_other_experts(copy: pairs.Served) -> None:
    config = copy.config().model_dump()
    config["experts"][0]["name"] = "somebody"
    message = _misfit(EngineConfig.model_validate(config))
    assert "gate.path: the gate is for the experts ['expert1'], the configuration has ['somebody']" in message


def test_regret_of_another_base(copy: pairs.Served) -> None:
    file = copy.gate / "regret.json"
    fields = json.loads(file.read_text())
    fields["base"]["architecture"]["num_hidden_layers"] = 9
    fields["base"]["config_sha256"] = "0" * 64
    file.write_text(json.dumps(fields))
    assert "gate.path: the regret was made for another base: " in _misfit(copy.config())
    file.write_text("{")
    assert f"{file}: cannot be read as JSON" in _misfit(copy.config())


def test_regret_for_a_base_of_another_width(copy: pairs.Served) -> None:
    artifact = RegretArtifact.load(copy.gate)
    dataclasses.replace(artifact, theta=torch.zeros(1, 65)).save(copy.gate)
    assert "gate.path: the regret is for hidden size 64, the base has 128" in _misfit(copy.config())


def test_a_default_regret_that_nobody_was_trained_for(copy: pairs.Served) -> None:
    wanted = copy.config().model_copy(update={"gate": copy.config().gate.model_copy(update={"regret": 0.5})})
    make_plan(wanted)
    (copy.gate / "regret.json").unlink()
    assert _misfit(wanted).startswith("gate.regret: nothing can be taken back without a regret artifact")


def test_missing_checkpoint(copy: pairs.Served) -> None:
    shutil.rmtree(copy.experts["expert1"])
    assert _misfit(copy.config()).startswith("experts.expert1.model: ")


@pytest.mark.slow  # comes to light as in the next test; the same of an expert: test_24_missing_weights
def test_missing_weights(copy: pairs.Served) -> None:
    (copy.base / "model.safetensors").unlink()
    assert _refusal(copy.config()).startswith("base: vLLM cannot start ")


def test_truncated_weights(copy: pairs.Served) -> None:
    file = copy.experts["expert1"] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert _refusal(copy.config()).startswith("experts.expert1: vLLM cannot start ")


def test_damaged_gate(copy: pairs.Served) -> None:
    file = copy.gate / "gate.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert "gate.safetensors" in _misfit(copy.config())


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        (
            "max_model_length",
            100,
            "base.vllm.max_model_length: vLLM has no such engine option; did you mean 'max_model_len'?",
        ),
        ("async_scheduling", True, "base.vllm.async_scheduling: cannot be set"),
    ],
)
def test_options_that_are_not_vllms_or_not_the_users(
    option: str, value: object, expected: str, random_pair: pairs.Served
) -> None:
    base = random_pair.config(**{option: value}).base
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own, where it is imported here for the first time
        with pytest.raises(CollmError) as caught:
            engine_arguments(base, label="base", max_num_seqs=4, vocab_size=512, gate_path=None, gate_in_head=False)
    assert str(caught.value).startswith(expected)


def test_ray_is_refused_where_it_would_fail_or_go_past_the_lanes_worker(
    random_pair: pairs.Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    (expert,) = random_pair.config(executor="ray").experts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own, where it is imported here for the first time
        from vllm.platforms import current_platform

    def refusal() -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(CollmError) as caught:
                engine_arguments(
                    expert, label="experts.e", max_num_seqs=4, vocab_size=512, gate_path=None, gate_in_head=False
                )
        return str(caught.value)

    monkeypatch.setattr(type(current_platform), "ray_device_key", "")
    assert f"vLLM on this {current_platform.device_type} has none: use 'mp'" in refusal()
    monkeypatch.setattr(type(current_platform), "ray_device_key", "GPU")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "experts.e.executor: 'ray' needs the package ray: make install-ray" in refusal()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "0")
    assert "needs VLLM_USE_RAY_V2_EXECUTOR_BACKEND=1" in refusal()


def test_grammars_have_one_back_end_in_all_lanes(random_pair: pairs.Served) -> None:
    """Left to itself, a lane takes the one that suits the first grammar it sees."""

    def arguments(**options: object) -> dict[str, Any]:
        base = random_pair.config(**options).base
        return engine_arguments(base, label="base", max_num_seqs=4, vocab_size=512, gate_path=None, gate_in_head=False)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from vllm.engine.arg_utils import EngineArgs

        plain = arguments()["structured_outputs_config"]
        compact = arguments(structured_outputs_config={"disable_any_whitespace": True})["structured_outputs_config"]
        # vLLM writes its own option into the same object.
        parser = EngineArgs(**arguments(reasoning_parser="qwen3")).create_structured_outputs_config()
        with pytest.raises(CollmError, match=r"^base\.vllm\.structured_outputs_config: .*no_such_option"):
            arguments(structured_outputs_config={"no_such_option": 1})
    assert (plain.backend, compact.backend, parser.backend) == ("guidance",) * 3
    assert (plain.disable_any_whitespace, compact.disable_any_whitespace) == (False, True)
    assert parser.reasoning_parser == "qwen3"


def test_options_that_vllm_refuses(random_pair: pairs.Served) -> None:
    config = random_pair.config().model_dump()
    config["base"]["vllm"]["max_model_len"] = 10**7
    assert _refusal(EngineConfig.model_validate(config)).startswith("base: vLLM cannot start ")
