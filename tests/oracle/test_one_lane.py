"""What a single vLLM lane promises, where the whole engine shows it only by an unlucky order of events."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from typing import Any

import pytest

from tests.oracle import pairs
from tests.oracle.triton_on_cpu import interpreted
from tests.packaging.sources import ROOT


@pytest.fixture(
    scope="module",
    params=["v1", pytest.param("v2", marks=pytest.mark.slow)],  # interpreted, it takes a minute
)
def found(request: pytest.FixtureRequest, random_pair: pairs.Served, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """On each of vLLM's model runners; on V2 vLLM's own steps, which warm it up, come first."""
    with ExitStack() as stack:
        if request.param == "v2":
            stack.enter_context(interpreted(tmp_path_factory.mktemp("triton")))
        result = subprocess.run(
            [sys.executable, "-m", "tests.oracle.one_lane", str(random_pair.base), request.param],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_drafts_are_never_in_a_block_that_others_read(found: dict[str, Any]) -> None:
    """Were a draft's block taken from the prefix cache, the cut would overwrite it under whoever shares it."""
    drafts = found["drafts"]
    assert len(drafts["blocks"]["first"]) == 3
    assert set(drafts["blocks"]["first"]).isdisjoint(drafts["blocks"]["drafting"])
    assert drafts["again"] == pytest.approx(drafts["first"], abs=1e-4)


def test_no_whole_text_travels_with_a_step(found: dict[str, Any]) -> None:
    assert len(found["texts"]) >= 7
    assert set(found["texts"]) == {0}


def test_masks_that_take_too_long_end_their_own_request(found: dict[str, Any]) -> None:
    """With a reason that is the client's to mend; who shares the batch gets what it gets alone."""
    masks = found["masks"]
    tokens, reason, error, code, refused = masks["slow"]
    assert 1 <= len(tokens) < 20
    assert (reason, code, refused) == ("error", "invalid_grammar", True)
    assert "masks take too long" in error
    assert len(masks["other"][0]) == 30
    assert masks["other"] == masks["alone"]
    assert masks["leftovers"] == []
