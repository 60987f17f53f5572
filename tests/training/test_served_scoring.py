"""The serving engine scores as transformers does; hidden states and features reach the disk as they were read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.gates import FEATURES
from engine.vllm_hooks.record import row_name, row_of
from tests.packaging.sources import ROOT
from tests.training.builders import TinyProject, write_jsonl
from training.data import TokenExample
from training.errors import DataError, TrainingError
from training.scoring import HIDDEN_FILE, ModelScores, PairScores
from training.stages.score import score_split, score_texts

DEMO = ROOT / "models" / "demo"
LONGEST = 70
"""Tokens that one completion has at least: more than one window of the scorer."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    """The demo's pair, some of its questions, and a completion of several windows."""
    folder = tmp_path_factory.mktemp("served")
    questions: list[dict[str, Any]] = json.loads((DEMO / "questions.json").read_text())[::12]
    rows = [{"prompt": q["prompt"], "completion": q["completion"]} for q in questions]
    rows.append({"prompt": "Question: What?\nAnswer:", "completion": " " + "the alpha-3 code of Ghana is GHA. " * 12})
    for split in ("train", "validation"):
        write_jsonl(folder / f"{split}.jsonl", rows)
    content = {
        "out": str(folder / "out"),
        "base": {"model": str(DEMO / "base")},
        "experts": [{"name": "codes", "model": str(DEMO / "codes")}],
        "data": {split: str(folder / f"{split}.jsonl") for split in ("train", "validation")},
        "compute": {"device": "cpu", "threads": 1},
        "score": {"shard": 20},
        "engine": {
            "kv_cache_memory_bytes": 1 << 25,
            "max_num_seqs": 16,
            "vllm": {"dtype": "float32", "max_model_len": 256, "max_num_batched_tokens": 96},
        },
    }
    return TinyProject(folder, content)


@pytest.fixture(scope="module")
def both(project: TinyProject) -> tuple[PairScores, PairScores]:
    found: list[PairScores] = []
    for by in ("transformers", "engine"):
        content = {**project.content, "out": str(project.folder / by), "score": {"shard": 20, "by": by}}
        found.append(score_split(TinyProject(project.folder, content).project, "train"))
    assert max(b - a for a, b in zip(found[0].starts, found[0].starts[1:], strict=False)) > LONGEST
    return found[0], found[1]


def test_scores_are_equal(both: tuple[PairScores, PairScores]) -> None:
    """In chunks of the prompt, in several windows, and with prompts that begin alike."""
    ours, served = both
    for mine, other in ((ours.base, served.base), (ours.experts[0], served.experts[0])):
        torch.testing.assert_close(other.logp_N, mine.logp_N, atol=2e-4, rtol=2e-5)
        assert (other.top_N == mine.top_N).double().mean() > 0.999
    assert torch.equal(served.gold_N, ours.gold_N)
    assert torch.equal(served.weak_labels(), ours.weak_labels())


def test_hidden_states_and_features_are_equal(both: tuple[PairScores, PairScores]) -> None:
    ours, served = both
    torch.testing.assert_close(served.hidden_ND, ours.hidden_ND, atol=2e-4, rtol=2e-4)
    assert ours.base.features_NF is not None
    assert served.base.features_NF is not None
    torch.testing.assert_close(served.base.features_NF, ours.base.features_NF, atol=2e-3, rtol=2e-3)


@pytest.mark.slow
def test_texts_that_are_no_split_s_are_scored_alike(project: TinyProject) -> None:
    """Where one token stands for what would come, and texts begin alike."""
    found: list[ModelScores] = []
    for by in ("transformers", "engine"):
        content = {**project.content, "out": str(project.folder / by), "score": {"shard": 20, "by": by}}
        made = TinyProject(project.folder, content).project
        texts = [
            TokenExample([*asked.prompt, *asked.completion[:length]], [0])
            for asked in made.data("train").tokens
            for length in (0, 3)
        ]
        folder = project.folder / by / "texts"
        found.append(score_texts(made, made.user_base, texts, folder, "texts"))
    ours, theirs = found
    assert len(ours.logp_N) > 40
    torch.testing.assert_close(ours.inputs(FEATURES), theirs.inputs(FEATURES), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.logp_N, theirs.logp_N, rtol=1e-3, atol=1e-3)


def test_an_interruption_costs_a_shard(project: TinyProject, both: tuple[PairScores, PairScores]) -> None:
    """What a later start scores anew is what was there, and the rest is not touched."""
    _, served = both
    before = served.hidden_ND.clone()
    folder = project.folder / "engine/score/train/base"
    (folder / "done.json").unlink()
    (folder / "shard-00001.safetensors").unlink()
    table = torch.from_file(str(folder / HIDDEN_FILE), shared=True, size=before.numel()).view(before.shape)
    rows = slice(served.starts[20], served.starts[40])
    table[rows] = 0.0
    content = {**project.content, "out": str(project.folder / "engine"), "score": {"shard": 20, "by": "engine"}}
    again = score_split(TinyProject(project.folder, content).project, "train")
    torch.testing.assert_close(again.hidden_ND, before, atol=2e-4, rtol=2e-4)
    assert torch.equal(again.hidden_ND[: rows.start], before[: rows.start])


def test_rows_of_texts_do_not_meet() -> None:
    names = [row_name(first, position) for first, position in ((0, 7), (5, 12), (9, 3))]
    assert len(set(names)) == 3
    assert [row_of(name, position) for name, position in zip(names, (7, 12, 3), strict=True)] == [0, 5, 9]
    assert row_of(names[1], 14) == 7


@pytest.mark.slow
def test_what_the_engine_refuses_is_said(project: TinyProject, tmp_path: Path) -> None:
    vllm = {**project.content["engine"]["vllm"], "max_model_len": 16}
    content = {
        **project.content,
        "out": str(tmp_path),
        "score": {"by": "engine"},
        "engine": {**project.content["engine"], "vllm": vllm},
    }
    with pytest.raises((TrainingError, DataError), match=r"16|context|max_model_len"):
        score_split(TinyProject(tmp_path, content).project, "train")
