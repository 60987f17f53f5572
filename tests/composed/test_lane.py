"""A composed checkpoint on a vLLM lane equals a float32 loop over its members, whatever the lane does meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.composed import one_lane
from tests.composed.checkpoints import LLAMA, PLANS, compose
from tests.composed.reference import Reference
from tests.packaging.sources import ROOT

UNTRAINED = "not trained"
FILL = 1e6
"""Whatever a lane reads that it has not written is far off. (Not NaN: vLLM's CPU attention gives what stands in the
unwritten rest of a page the weight 0, and 0 times NaN is NaN.)"""


@pytest.fixture(scope="module")
def folders(composed: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: composed(name) for name in PLANS}
    members = composed("llama reads qwen2").parent
    found[UNTRAINED] = compose(
        tmp_path_factory.mktemp("untrained") / "composed",
        members / "anchor",
        {"other": members / "other"},
        LLAMA.connections,
        LLAMA.heads,
        scale=0.0,
        seed=1,
    )
    found["anchor"] = members / "anchor"
    return found


@pytest.fixture(scope="module")
def found(folders: dict[str, Path]) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, "-m", "tests.composed.one_lane", str(FILL), *map(str, folders.values())],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout.splitlines()[-1])
    return {name: answers[str(folder)] for name, folder in folders.items()}


@pytest.mark.parametrize("name", PLANS)
def test_lane_equals_the_float32_loop(name: str, folders: dict[str, Path], found: dict[str, Any]) -> None:
    """20 prompts in chunks, in a batch, with preemption, from the prefix cache, alone, and cut and extended."""
    reference, prompts, got = Reference(folders[name]), one_lane.prompts(), found[name]
    want = [reference.greedy(prompt, one_lane.WRITTEN) for prompt in prompts]
    assert got["together"] == want
    assert got["again"] == want
    assert got["alone"] == want[: len(got["alone"])]
    assert got["preemptions"] > 0, "the KV memory was meant to be too small"
    assert got["leftovers"] == []
    # Members' layers, of which those above the last one that is read are left out, and one for each connection.
    layers = {c.augmenting: 0 for c in PLANS[name].connections}
    for connection in PLANS[name].connections:
        layers[connection.augmenting] = max(layers[connection.augmenting], connection.layer)
    assert got["caches"] == 2 + sum(layers.values()) + len(PLANS[name].connections)
    texts = {
        "whole": prompts[0] + one_lane.DRAFTS,
        "after": prompts[0] + one_lane.DRAFTS[: one_lane.KEPT] + one_lane.INSTEAD,
    }
    for scene, text in texts.items():
        top = torch.log_softmax(reference.logits(text)[-1], -1).topk(3)
        assert got["cut"][scene]["ids"] == top.indices.tolist()
        assert got["cut"][scene]["logprobs"] == pytest.approx(top.values.tolist(), abs=1e-3)


def test_the_connections_matter(found: dict[str, Any]) -> None:
    """Else all of the above would hold without them."""
    assert found["llama reads qwen2"]["together"] != found["anchor"]["together"]


def test_a_composition_that_was_not_trained_is_the_anchor(found: dict[str, Any]) -> None:
    """Token for token, and bit for bit in the log-probabilities."""
    assert found[UNTRAINED]["together"] == found["anchor"]["together"]
    assert found[UNTRAINED]["logprobs"] == found["anchor"]["logprobs"]


@pytest.mark.parametrize("name", PLANS)
def test_the_oracle_is_causal(name: str, composed: Callable[[str], Path]) -> None:
    """What comes later changes nothing before it, bit for bit."""
    reference, text = Reference(composed(name)), one_lane.prompts()[-1][:40]
    changed = [*text[:20], *((token * 7) % 511 + 1 for token in text[20:])]
    assert torch.equal(reference.logits(text)[:20], reference.logits(changed)[:20])
    assert not torch.equal(reference.logits(text)[20:], reference.logits(changed)[20:])
