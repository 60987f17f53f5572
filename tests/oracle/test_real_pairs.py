"""Pairs as people have them: an expert that a fine-tune gave more tokens, other names, other ends, another width.

What is decided before anything is loaded is asked of ``make_plan``; one engine shows that it holds for what is written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from engine.checkpoints import Checkpoint
from engine.errors import GateError
from engine.gate import GateArtifact
from engine.offline import Engine
from engine.types import Collaboration, GenerationRequest, SamplingSpec
from engine.vllm_hooks.load import make_plan
from tests.oracle import families, pairs

ADDED = 17


def _add_tokens(directory: Path, tokens: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"extra_special_tokens": tokens})
    tokenizer.save_pretrained(directory)


def _edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.fixture
def pair(random_pair: pairs.Served, tmp_path: Path) -> pairs.Served:
    """The random pair in files that may be changed."""
    shutil.copytree(random_pair.base.parent, tmp_path / "pair")
    folder = tmp_path / "pair"
    return pairs.Served(folder / "base", {"expert1": folder / "expert1"}, folder / "gate", random_pair.reference, 192)


def test_tokens_added_to_either_side(pair: pairs.Served) -> None:
    """Without rows too: their ids are masked, and the gate is still the pair's."""
    for directory in (pair.experts["expert1"], pair.base):
        _add_tokens(directory, ["<|one|>"])
        plan = make_plan(pair.config())
        assert plan.gate is not None
        assert plan.vocab_size == 512
        assert plan.shared.masked(0) == plan.shared.masked(1) == []


def test_a_gate_does_not_mind_how_a_config_was_saved(pair: pairs.Served) -> None:
    """Another version of transformers writes other keys; the context may have been stretched."""
    for directory in (pair.base, pair.experts["expert1"]):
        _edit(directory / "config.json", lambda c: c.update(transformers_version="4.1", new_key=1))
        _edit(directory / "config.json", lambda c: c.update(max_position_embeddings=2048))
    _edit(pair.experts["expert1"] / "config.json", lambda c: c.update(intermediate_size=1))
    assert make_plan(pair.config()).gate is not None
    _edit(pair.base / "config.json", lambda c: c.update(rms_norm_eps=0.5))
    with pytest.raises(GateError, match=r"config\.json rms_norm_eps is 0\.5, not"):
        make_plan(pair.config())


def test_ends_are_read_wherever_they_stand(pair: pairs.Served) -> None:
    _edit(pair.experts["expert1"] / "generation_config.json", lambda c: c.update(eos_token_id=[0, 10]))
    assert make_plan(pair.config()).eos_token_ids == [0, 10]
    (pair.base / "generation_config.json").unlink()
    _edit(pair.base / "config.json", lambda c: c.update(eos_token_id=[7, 8]))
    assert make_plan(pair.config()).eos_token_ids == [7, 8, 0, 10], "its tokenizer's own too"


def test_a_tokenizer_of_its_own_is_the_one_that_counts(pair: pairs.Served, tmp_path: Path) -> None:
    expert = pair.experts["expert1"]
    Path(shutil.copytree(expert, tmp_path / "tokenizer"))
    for file in expert.glob("tokenizer*"):
        file.unlink()
    config = pair.config(tokenizer=str(tmp_path / "tokenizer"))
    assert make_plan(config).gate is not None


def test_vocabulary_and_merges_are_converted_once(
    pair: pairs.Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = tmp_path / "old"
    directory.mkdir()
    whole = Tokenizer.from_file(str(pair.base / "tokenizer.json"))
    whole.model.save(str(directory))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"})
    )
    shutil.copy(pair.base / "config.json", directory)
    found = Checkpoint(directory).vocabulary
    assert found.ids == Checkpoint(pair.base).vocabulary.ids
    (converted,) = (tmp_path / "cache" / "collm" / "tokenizers").iterdir()
    before = (converted / "tokenizer.json").stat().st_mtime_ns
    assert Checkpoint(directory).vocabulary.ids == found.ids
    assert (converted / "tokenizer.json").stat().st_mtime_ns == before


def test_the_gate_must_be_as_wide_as_what_the_head_reads(tmp_path: Path) -> None:
    """OPT may project its hidden state before the head."""
    (family,) = [family for family in families.FAMILIES if family.name == "OPT"]
    served = families.pair_of(family.make(0), family.make(1), tmp_path)
    assert make_plan(served.config()).gate is not None
    gate = GateArtifact.load(served.gate)
    GateArtifact(
        torch.zeros(1, 128), gate.bias, gate.experts, base=gate.base, expert_identities=gate.expert_identities
    ).save(served.gate)
    with pytest.raises(GateError, match="hidden size 128, the base has 64"):
        make_plan(served.config())


def _model(rows: int, seed: int) -> Any:
    torch.manual_seed(seed)
    settings = {**families.COMMON, "vocab_size": rows}
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def test_what_not_all_know_is_never_written(tmp_path: Path) -> None:
    """A base padded beyond its tokenizer; an expert with 17 tokens more, one of which ends its turn."""
    expert_end = 512 + ADDED - 1
    base, expert = _model(576, 0), _model(512 + ADDED, 1)
    with torch.no_grad():
        # Both would rather write what only they have than anything else; the expert's end comes after some text.
        for model, first in ((base, 512), (expert, 512)):
            model.lm_head.weight[first:] *= 3
        base.model.embed_tokens.weight[512:] = float("nan")  # what another member wrote must never come here
    served = families.pair_of(base, expert, tmp_path)
    _add_tokens(tmp_path / "expert1", [f"<|added{number}|>" for number in range(ADDED)])
    _edit(tmp_path / "expert1" / "generation_config.json", lambda c: c.update(eos_token_id=[0, expert_end]))
    identities = [Checkpoint(tmp_path / name).identity for name in ("base", "expert1")]
    gate = GateArtifact.load(served.gate)
    GateArtifact(gate.theta, gate.bias, gate.experts, base=identities[0], expert_identities=(identities[1],)).save(
        served.gate
    )
    with Engine(served.config()) as engine:
        assert engine.info.vocab_size == 512 + ADDED
        assert engine.info.eos_token_ids == [0, expert_end]
        requests = [
            GenerationRequest(
                f"{ignore}-{member}-{number}",
                [5, 6, number + 1],
                SamplingSpec(temperature=2.0, max_tokens=40, seed=number, ignore_eos=ignore, logprobs=5),
                Collaboration(member=member) if member is not None else Collaboration(),
            )
            for ignore in (False, True)
            for member in (None, 0, 1)
            for number in range(8)
        ]
        found = engine.generate(requests)
    assert not [one.error for one in found if one.error]
    for request, one in zip(requests, found, strict=True):
        ends = {0, expert_end} if not request.sampling.ignore_eos else set()
        assert all(token < 512 for token in one.tokens[:-1])
        assert one.tokens[-1] < 512 or one.tokens[-1] in ends
        assert (one.finish_reason == "stop") == bool(ends.intersection(one.tokens))
        assert one.logprobs is not None
        assert all(token < 512 or token == expert_end for at in one.logprobs for token in at.token_ids[:1])
    assert expert_end in {one.tokens[-1] for one in found}, "the expert's own end is the likeliest of what it may write"
