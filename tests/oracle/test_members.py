"""``never`` is the base alone and ``always`` the expert alone; a member alone never touches the other lane."""

from __future__ import annotations

import pytest

from engine.offline import Engine
from engine.types import Collaboration, Completion, GenerationRequest, SamplingSpec
from tests.oracle.checks import assert_empty


def _generate(
    engine: Engine, prompts: list[list[int]], collaboration: Collaboration, temperature: float
) -> list[Completion]:
    return engine.generate(
        GenerationRequest(
            f"{number}",
            prompt,
            SamplingSpec(temperature=temperature, max_tokens=24, seed=1000 + number),
            collaboration,
        )
        for number, prompt in enumerate(prompts)
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("policy", "member"), [("never", 0), ("always", 1)])
def test_policy_equals_member(
    policy: str, member: int, temperature: float, plain_engine: Engine, prompts: list[list[int]]
) -> None:
    joint = _generate(plain_engine, prompts[:16], Collaboration(policy=policy), temperature)  # type: ignore[arg-type]
    steps = [lane.steps for lane in assert_empty(plain_engine).lanes]
    alone = _generate(plain_engine, prompts[:16], Collaboration(member=member), temperature)
    assert [one.tokens for one in joint] == [one.tokens for one in alone]
    assert {source for one in joint + alone for source in one.sources} == {member}
    assert all(value is not None for one in joint for value in one.deferrals)
    assert all(value is None for one in alone for value in one.deferrals)
    after = [lane.steps for lane in assert_empty(plain_engine).lanes]
    assert after[member] > steps[member]
    assert after[1 - member] == steps[1 - member], "a member alone stepped the other lane"


def test_mixed_policies_in_one_batch(plain_engine: Engine, prompts: list[list[int]]) -> None:
    """Every policy side by side gives what it gives alone."""
    kinds = [
        Collaboration(),
        Collaboration(policy="never"),
        Collaboration(policy="always"),
        Collaboration(policy="sample"),
        Collaboration(policy="random", rate=0.5),
        Collaboration(policy="confidence", threshold=0.5),
        Collaboration(member=0),
        Collaboration(member=1),
    ]
    requests = [
        GenerationRequest(
            f"mixed-{kind}-{number}", prompt, SamplingSpec(temperature=0.7, max_tokens=16, seed=number), collaboration
        )
        for kind, collaboration in enumerate(kinds)
        for number, prompt in enumerate(prompts[:4])
    ]
    together = plain_engine.generate(requests)
    alone = [plain_engine.generate([request])[0] for request in requests]
    assert [(one.tokens, one.sources) for one in together] == [(one.tokens, one.sources) for one in alone]
    assert_empty(plain_engine)
