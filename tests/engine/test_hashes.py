"""Block hashes of prompts: computed once, whoever asks, and for nobody else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from engine.vllm_hooks.hashes import PromptHashes


class Hasher:
    """Stands for vLLM's: blocks of four tokens, named by what they hold; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, request: Any) -> list[Any]:
        self.calls += 1
        tokens = request.prompt_token_ids + request.output
        done = len(request.block_hashes)
        return [tuple(tokens[: 4 * (block + 1)]) for block in range(done, len(tokens) // 4)]


def added(request_id: str, prompt: list[int]) -> Any:
    """vLLM's record of a request as it is when its constructor asks for hashes."""
    return SimpleNamespace(
        request_id=request_id, prompt_token_ids=prompt, output=[], num_output_tokens=0, block_hashes=[]
    )


@pytest.fixture
def hasher() -> Hasher:
    return Hasher()


def test_a_second_lane_does_not_hash_the_prompt_again(hasher: Hasher) -> None:
    hashes = PromptHashes()
    base, expert = hashes.shared(hasher, "same"), hashes.shared(hasher, "same")
    assert base is not None
    assert expert is not None
    prompt = list(range(10))
    expected = [(0, 1, 2, 3), tuple(range(8))]
    assert base(added("a", prompt)) == expected
    assert expert(added("a", prompt)) == expected
    assert hasher.calls == 1


def test_blocks_after_the_prompt_are_each_lanes_own(hasher: Hasher) -> None:
    base = PromptHashes().shared(hasher, "same")
    assert base is not None
    request = added("a", [1, 2, 3])
    assert base(request) == []
    request.output, request.num_output_tokens = [4, 5], 2
    assert base(request) == [(1, 2, 3, 4)]


def test_what_one_lane_was_given_does_not_change_with_what_another_does(hasher: Hasher) -> None:
    hashes = PromptHashes()
    base, expert = hashes.shared(hasher, "same"), hashes.shared(hasher, "same")
    assert base is not None
    assert expert is not None
    prompt = [1, 2, 3, 4]
    request = added("a", prompt)
    request.block_hashes.extend(base(request))
    request.output, request.num_output_tokens = [5, 6, 7, 8], 4
    request.block_hashes.extend(base(request))
    assert expert(added("a", prompt)) == [(1, 2, 3, 4)]


def test_lanes_that_name_blocks_differently_share_nothing(hasher: Hasher) -> None:
    hashes = PromptHashes()
    other = Hasher()
    base, expert = hashes.shared(hasher, (32, "sha256")), hashes.shared(other, (16, "sha256"))
    assert base is not None
    assert expert is not None
    prompt = [1, 2, 3, 4]
    base(added("a", prompt))
    expert(added("a", prompt))
    assert (hasher.calls, other.calls) == (1, 1)


def test_an_id_that_is_used_again_has_its_own_prompts_hashes(hasher: Hasher) -> None:
    base = PromptHashes().shared(hasher, "same")
    assert base is not None
    assert base(added("a", [1, 2, 3, 4])) == [(1, 2, 3, 4)]
    assert base(added("a", [5, 6, 7, 8])) == [(5, 6, 7, 8)]


def test_ended_requests_are_forgotten(hasher: Hasher) -> None:
    hashes = PromptHashes()
    base = hashes.shared(hasher, "same")
    assert base is not None
    base(added("a", [1, 2, 3, 4]))
    assert hashes.held() == ["a"]
    hashes.forget("a")
    hashes.forget("a")
    assert hashes.held() == []


def test_without_prefix_caching_there_is_nothing_to_share() -> None:
    assert PromptHashes().shared(None, "same") is None
