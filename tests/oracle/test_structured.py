"""Structured output: valid regardless of which model writes; a grammar that cannot be compiled fails alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer

from engine.offline import Engine
from engine.types import (
    Collaboration,
    Completion,
    ErrorCode,
    GenerationRequest,
    SamplingSpec,
    StructuredOutputs,
)
from tests.oracle import pairs
from tests.oracle.checks import assert_empty

SCHEMA = {
    "type": "object",
    "properties": {"code": {"type": "string", "pattern": "^[A-Z]{3}$"}, "year": {"enum": [1999, 2024]}},
    "required": ["code", "year"],
    "additionalProperties": False,
}


def _generate(engine: Engine, prompts: list[list[int]], structured: StructuredOutputs) -> list[Completion]:
    return engine.generate(
        GenerationRequest(
            f"{number}",
            prompt,
            SamplingSpec(temperature=1.0, seed=number, max_tokens=100, structured_outputs=structured),
            Collaboration(policy="random", rate=0.5),
        )
        for number, prompt in enumerate(prompts)
    )


def _text(served: pairs.Served, completion: Completion) -> str:
    return str(Tokenizer.from_file(str(served.base / "tokenizer.json")).decode(completion.tokens))


@pytest.mark.parametrize(
    ("structured", "valid"),
    [
        (
            StructuredOutputs(json=json.dumps(SCHEMA)),
            lambda text: (
                re.fullmatch("[A-Z]{3}", json.loads(text)["code"]) and json.loads(text)["year"] in (1999, 2024)
            ),
        ),
        (StructuredOutputs(regex="[a-c]{5}-[0-9]{3}"), lambda text: re.fullmatch("[a-c]{5}-[0-9]{3}", text)),
        (StructuredOutputs(choice=("north", "south", "west")), lambda text: text in ("north", "south", "west")),
        (StructuredOutputs(grammar='root ::= "x" [0-9] | "y" root'), lambda text: re.fullmatch("y*x[0-9]", text)),
    ],
    ids=["json", "regex", "choice", "grammar"],
)
def test_every_answer_is_valid(
    structured: StructuredOutputs,
    valid: object,
    plain_engine: Engine,
    random_pair: pairs.Served,
    prompts: list[list[int]],
) -> None:
    completions = _generate(plain_engine, prompts[:16], structured)
    finished = [completion for completion in completions if completion.finish_reason == "stop"]
    assert len(finished) >= 8
    for completion in finished:
        assert valid(_text(random_pair, completion)), _text(random_pair, completion)  # type: ignore[operator]
    assert {source for completion in finished for source in completion.sources} == {0, 1}
    assert_empty(plain_engine)


def test_structured_and_free_requests_share_a_batch(plain_engine: Engine, prompts: list[list[int]]) -> None:
    free = [
        GenerationRequest(f"free-{number}", prompt, SamplingSpec(temperature=0.0, max_tokens=20))
        for number, prompt in enumerate(prompts[:8])
    ]
    bound = [
        GenerationRequest(
            f"bound-{number}",
            prompt,
            SamplingSpec(temperature=0.0, max_tokens=20, structured_outputs=StructuredOutputs(regex="[ab]{20}")),
        )
        for number, prompt in enumerate(prompts[:8])
    ]
    alone = plain_engine.generate(free)
    together = plain_engine.generate([*free, *bound])
    assert [one.tokens for one in together[:8]] == [one.tokens for one in alone]
    assert all(one.error is None and len(one.tokens) == 20 for one in together[8:])


@pytest.mark.parametrize(
    "structured",
    [
        StructuredOutputs(json="{"),
        StructuredOutputs(regex="("),
        StructuredOutputs(choice=()),
        StructuredOutputs(grammar="root ::= nothing"),
        StructuredOutputs(json="{}", regex="a"),
    ],
)
def test_a_bad_grammar_fails_alone(
    structured: StructuredOutputs, plain_engine: Engine, prompts: list[list[int]]
) -> None:
    bad, good = plain_engine.generate(
        [
            GenerationRequest("bad", prompts[0], SamplingSpec(structured_outputs=structured)),
            GenerationRequest("good", prompts[1], SamplingSpec(temperature=0.0, max_tokens=4, ignore_eos=True)),
        ]
    )
    assert bad.finish_reason == "error"
    assert bad.error
    assert bad.code is ErrorCode.INVALID_GRAMMAR
    assert len(good.tokens) == 4
    assert_empty(plain_engine)


def test_what_is_wrong_beside_a_good_grammar_is_not_its_fault(plain_engine: Engine, prompts: list[list[int]]) -> None:
    sampling = SamplingSpec(top_p=0.0, structured_outputs=StructuredOutputs(regex="a"))
    (bad,) = plain_engine.generate([GenerationRequest("bad", prompts[0], sampling)])
    assert bad.finish_reason == "error"
    assert bad.error is not None
    assert bad.error.startswith("top_p")
    assert bad.code is ErrorCode.INVALID_REQUEST


END = 40
"""Of the pair whose end of text has an id amid those of text."""


@pytest.fixture(scope="module")
def late_pair(tmp_path_factory: pytest.TempPathFactory) -> pairs.Served:
    return pairs.random_pair(tmp_path_factory.mktemp("late-pair"), end=END)


@pytest.fixture(scope="module")
def late_engine(late_pair: pairs.Served) -> Iterator[Engine]:
    with Engine(late_pair.config()) as engine:
        yield engine


@pytest.fixture(params=[0, END])
def by_end(request: pytest.FixtureRequest) -> tuple[int, pairs.Served, Engine]:
    """An end of text, a pair that has it, and its engine."""
    names = ("random_pair", "plain_engine") if request.param == 0 else ("late_pair", "late_engine")
    served, engine = map(request.getfixturevalue, names)
    return request.param, served, engine


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingSpec(min_tokens=8),
        SamplingSpec(ignore_eos=True),
        SamplingSpec(ignore_eos=True, min_tokens=8, stop_token_ids=(300,)),
        SamplingSpec(min_tokens=8, stop_token_ids=(300, 301)),
        SamplingSpec(stop_token_ids=(300,)),
    ],
)
@pytest.mark.parametrize(
    "structured",
    [StructuredOutputs(choice=("ab",)), StructuredOutputs(grammar='root ::= "ab"'), StructuredOutputs(regex="ab")],
    ids=["choice", "grammar", "regex"],
)
def test_a_complete_form_ends_the_answer_whatever_else_is_asked(
    structured: StructuredOutputs,
    sampling: SamplingSpec,
    by_end: tuple[int, pairs.Served, Engine],
    prompts: list[list[int]],
) -> None:
    end, served, engine = by_end
    spec = msgspec.structs.replace(sampling, max_tokens=20, seed=1, structured_outputs=structured)
    (completion,) = engine.generate([GenerationRequest("one", prompts[0], spec)])
    assert completion.finish_reason == "stop"
    assert completion.error is None
    assert completion.tokens[-1] in (end, *sampling.stop_token_ids)
    assert _text(served, msgspec.structs.replace(completion, tokens=completion.tokens[:-1])) == "ab"


def test_min_tokens_hold_as_far_as_the_form_lets_them(
    by_end: tuple[int, pairs.Served, Engine], prompts: list[list[int]]
) -> None:
    end, _, engine = by_end
    spec = SamplingSpec(min_tokens=9, max_tokens=40, structured_outputs=StructuredOutputs(regex="[ab]{2,12}"))
    for completion in engine.generate(
        GenerationRequest(f"{number}", prompt, msgspec.structs.replace(spec, seed=number))
        for number, prompt in enumerate(prompts[:6])
    ):
        assert completion.finish_reason == "stop"
        assert completion.tokens[-1] == end
        assert 9 <= len(completion.tokens) <= 13


@pytest.mark.parametrize("also", [{"allowed_token_ids": (5, 6)}, {"bad_words": ((5,),)}])
def test_what_could_leave_no_token_is_refused(also: dict[str, Any], plain_engine: Engine) -> None:
    spec = SamplingSpec(structured_outputs=StructuredOutputs(regex="a"), **also)
    (bad,) = plain_engine.generate([GenerationRequest("bad", [1], spec)])
    assert bad.error is not None
    assert bad.error.startswith("allowed_token_ids and bad_words cannot")


def test_others_go_on_while_forms_are_read(plain_engine: Engine, prompts: list[list[int]]) -> None:
    """One client's forms take seconds each; another's answers, with a form and without, do not wait for them."""

    def slow(number: int) -> StructuredOutputs:
        rules = " | ".join(f'"{number:x}{each:x}" root' for each in range(3000))
        return StructuredOutputs(grammar=f'root ::= {rules} | "x"')

    requests = [
        GenerationRequest(f"slow-{number}", prompts[0], SamplingSpec(structured_outputs=slow(number)), client="greedy")
        for number in range(6)
    ]
    free = SamplingSpec(temperature=0.0, max_tokens=20, ignore_eos=True)
    boolean = SamplingSpec(structured_outputs=StructuredOutputs(json='{"type": "boolean"}'))
    requests.append(GenerationRequest("free", prompts[1], free))
    requests.append(GenerationRequest("form", prompts[1], boolean, client="another"))
    order: list[str] = []
    plain_engine.generate(requests, on_done=lambda completion: order.append(completion.request_id))
    assert order.index("free") <= 2
    assert order.index("form") <= 3
    assert_empty(plain_engine)
