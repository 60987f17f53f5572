"""Blends in real lanes, against the float32 loops of ``blend_loop``: token for token, whatever the request asks for."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
from tokenizers import Tokenizer, decoders
from vllm.platforms import current_platform

from engine.blends import Blend
from engine.client import EngineClient
from engine.config import EngineConfig
from engine.lanes.shelf import Shelf
from engine.offline import Engine
from engine.types import BASE, BLEND, Collaboration, GenerationRequest, SamplingSpec
from tests.oracle import blend_loop, pairs
from tests.oracle.blend_loop import Form, Method, decode, regex_form
from tests.oracle.blended import EXPERTS, LOOPS, PARAMETERS, PATTERN, engine_blend, looped, requests, same
from tests.oracle.checks import LOG_PROBABILITY, assert_empty, frequencies_pvalue
from tests.oracle.pairs import CHUNKED, TIGHT
from tests.oracle.reference import hidden_and_logits

LEVEL = 1e-4
"""See tests/oracle/test_sampling.py."""
QUICK = ("greedy", "sampled")


@pytest.fixture(scope="module")
def related(tmp_path_factory: pytest.TempPathFactory) -> pairs.Served:
    """Three models that often agree, so that drafts stand, are cut, and stand in part."""
    return pairs.random_pair(tmp_path_factory.mktemp("related"), EXPERTS, related=True)


@pytest.fixture(scope="module")
def engine(related: pairs.Served) -> Iterator[Engine]:
    with Engine(related.config()) as engine:
        engine.generate([GenerationRequest("first", [1], SamplingSpec(max_tokens=1))])
        yield engine


@pytest.fixture(scope="module")
def form(related: pairs.Served) -> Form:
    tokenizer = Tokenizer.from_file(str(related.base / "tokenizer.json"))
    decoder = decoders.ByteLevel()
    names = [tokenizer.id_to_token(token) for token in range(512)]
    return regex_form(PATTERN, [None, *(decoder.decode([name]) for name in names[1:])])


# The whole table takes minutes; the quick part has every kind, and every way of sampling for two of them.
TABLE = [
    pytest.param(
        kind, parameters, marks=[] if parameters in QUICK or kind == "mixture of three" else [pytest.mark.slow]
    )
    for kind in LOOPS
    for parameters in PARAMETERS
]


@pytest.mark.parametrize(("kind", "parameters"), TABLE)
def test_equals_the_loop(
    kind: str, parameters: str, engine: Engine, related: pairs.Served, prompts: list[list[int]], form: Form
) -> None:
    """With drafts where the parameters allow them."""
    # vLLM takes log-probabilities after a grammar's mask, and before all else.
    fields = {"logprobs": None if parameters == "grammar" else 3, **PARAMETERS[parameters]}
    got = engine.generate(requests(prompts[:8], engine_blend(LOOPS[kind]), kind + parameters, run_ahead=4, **fields))
    del fields["logprobs"]
    same(got, looped(related, LOOPS[kind], prompts[:8], form, **fields))
    assert_empty(engine)


@pytest.mark.slow
@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize("kind", LOOPS)
def test_equals_the_loop_for_long(
    kind: str, parameters: str, engine: Engine, related: pairs.Served, prompts: list[list[int]], form: Form
) -> None:
    fields = {"tokens": 60, **PARAMETERS[parameters]}
    got = engine.generate(requests(prompts[:20], engine_blend(LOOPS[kind]), "long", **fields))
    # Of 1,200 positions float32 rounds the worst a little further: 1.1e-4 was seen, with AVX2.
    same(got, looped(related, LOOPS[kind], prompts[:20], form, **fields), tolerance=2 * LOG_PROBABILITY)


@pytest.mark.parametrize("run_ahead", ["off", 1, 16, "auto"])
def test_drafts_change_nothing(run_ahead: Any, engine: Engine, related: pairs.Served, prompts: list[list[int]]) -> None:
    for kind in ("mixture", "proxy"):
        fields = {"temperature": 0.8, "ignore_eos": True}
        got = engine.generate(
            requests(prompts[:8], engine_blend(LOOPS[kind]), f"{kind}{run_ahead}", run_ahead=run_ahead, **fields)
        )
        same(got, looped(related, LOOPS[kind], prompts[:8], **fields))
    assert_empty(engine)


def test_drafts_save_steps(engine: Engine, prompts: list[list[int]]) -> None:
    """On members that often agree, at equal output."""

    def steps(run_ahead: Any) -> tuple[int, list[list[int]]]:
        before = assert_empty(engine).lanes[1].steps
        blend = engine_blend(LOOPS["mixture"])
        got = engine.generate(
            requests(prompts[:8], blend, f"saves{run_ahead}", run_ahead=run_ahead, temperature=0.0, ignore_eos=True)
        )
        return assert_empty(engine).lanes[1].steps - before, [one.tokens for one in got]

    without, texts = steps("off")
    with_drafts, same_texts = steps(8)
    assert texts == same_texts
    # Where a step of models this small costs a GPU the same for both, drafts do not pay, and few are made.
    if current_platform.is_cpu():
        assert without >= 1.3 * with_drafts


@pytest.mark.parametrize(
    ("policy", "fields"),
    [("threshold", {"threshold": 0.5}), ("confidence", {"threshold": 0.4}), ("random", {"rate": 0.5})],
)
def test_the_policy_says_where(
    policy: Any, fields: dict[str, Any], engine: Engine, related: pairs.Served, prompts: list[list[int]]
) -> None:
    for kind in ("mixture by the gate", "union"):
        rules = {"policy": policy, **fields}
        loop = LOOPS[kind]
        if kind == "union":
            # The gate's probability is that of the members.
            loop = blend_loop.Blend("union", ((0, 0.4), (1, 0.3), (2, 0.3)), top=5)
        got = engine.generate(
            requests(prompts[:8], engine_blend(loop), policy + kind, temperature=0.0, ignore_eos=True, **rules)
        )
        same(got, looped(related, loop, prompts[:8], temperature=0.0, ignore_eos=True, **rules))
        assert {source for one in got for source in one.sources} == {BASE, BLEND}


def test_what_is_one_members_own(engine: Engine, prompts: list[list[int]]) -> None:
    """Without the others' steps; and where it is computed, since the other weighs next to nothing, it is the same."""
    fields: dict[str, Any] = {"temperature": 0.9, "ignore_eos": True}

    def texts(blend: Blend | None, tag: str, **more: Any) -> list[list[int]]:
        return [one.tokens for one in engine.generate(requests(prompts[:8], blend, tag, **fields, **more))]

    base = texts(None, "base", policy=None, member=0)
    expert = texts(None, "expert", policy=None, member=1)
    assert base != expert
    before = assert_empty(engine).lanes
    assert texts(Blend("mixture", ((0, 1.0), (1, 0.0))), "all on the base") == base
    assert texts(Blend("product", ((0, 1.0), (1, 0.0), (2, 0.0))), "proxy of alpha 0") == base
    assert [lane.steps for lane in assert_empty(engine).lanes[1:]] == [lane.steps for lane in before[1:]]
    assert texts(Blend("mixture", ((0, 0.0), (1, 1.0))), "all on the expert") == expert
    assert texts(Blend("product", ((0, 0.0), (1, 1.0))), "contrast of beta 0") == expert
    assert assert_empty(engine).lanes[2].steps == before[2].steps
    tiny = 1e-30
    assert texts(Blend("product", ((0, 1.0), (1, tiny), (2, -tiny))), "proxy of next to nothing") == base
    assert texts(Blend("product", ((0, tiny), (1, 1.0))), "contrast of next to nothing") == expert


def test_alone_and_in_a_batch(engine: Engine, prompts: list[list[int]]) -> None:
    items = [
        request
        for kind, loop in LOOPS.items()
        for request in requests(prompts[:5], engine_blend(loop), kind, temperature=1.0, logprobs=1)
    ]
    batch = engine.generate(items)
    alone = [engine.generate([item])[0] for item in items[::3]]
    assert [one.tokens for one in alone] == [one.tokens for one in batch[::3]]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({**CHUNKED, **TIGHT}, id="chunked, tight"),
        pytest.param({"enable_prefix_caching": False}, id="no prefix caching", marks=pytest.mark.slow),
        pytest.param({"scheduler": {"gather": 8, "run_ahead": 3}}, id="gather", marks=pytest.mark.slow),
    ],
)
def test_any_way_of_computing(settings: dict[str, Any], related: pairs.Served, prompts: list[list[int]]) -> None:
    fields = {"temperature": 1.1, "ignore_eos": True, "tokens": 40}
    with Engine(related.config(**settings)) as engine:
        for kind in ("proxy", "mixture by the gate"):
            got = engine.generate(requests(prompts[:16], engine_blend(LOOPS[kind]), kind, **fields))
            same(got, looped(related, LOOPS[kind], prompts[:16], **fields))
        stats = assert_empty(engine)
        if "kv_blocks" in settings:
            assert min(lane.preemptions for lane in stats.lanes) > 0


@pytest.mark.slow
def test_members_change_places(
    related: pairs.Served, engine: Engine, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    names = list(related.experts)
    swapped = pairs.Served(
        related.experts[names[0]],
        {names[0]: related.base, names[1]: related.experts[names[1]]},
        related.gate,
        related.reference,
        related.max_model_len,
    )
    fields: dict[str, Any] = {"temperature": 0.0}
    got = engine.generate(requests(prompts[:16], Blend("mixture", ((0, 0.3), (1, 0.7))), "as they are", **fields))
    with Engine(swapped.config(gate=False)) as other:
        back = other.generate(requests(prompts[:16], Blend("mixture", ((0, 0.7), (1, 0.3))), "swapped", **fields))
    assert [one.tokens for one in back] == [one.tokens for one in got]


@pytest.mark.parametrize("draws", [1500, pytest.param(20000, marks=pytest.mark.slow)])
def test_frequencies(draws: int, engine: Engine, related: pairs.Served, prompts: list[list[int]]) -> None:
    prompt, loop = prompts[3], LOOPS["mixture of three"]
    spec = [
        GenerationRequest(
            f"draw-{number}",
            prompt,
            SamplingSpec(temperature=1.0, max_tokens=1, seed=number),
            Collaboration(policy="always", blend=engine_blend(loop)),
        )
        for number in range(draws)
    ]
    counts = Counter(one.tokens[0] for one in engine.generate(spec))
    with torch.inference_mode():
        reference = related.reference
        rows = [hidden_and_logits(model, prompt)[1] for model in (reference.base, *reference.experts)]
    assert loop.weights != "gate"
    wanted = sum(weight * torch.softmax(rows[lane].double(), -1) for lane, weight in loop.weights)
    common = [token for token in range(512) if float(wanted[token]) * draws >= 8]
    assert len(common) > 5
    observed = [counts[token] for token in common]
    shares = [float(wanted[token]) for token in common]
    assert frequencies_pvalue([*observed, draws - sum(observed)], [*shares, 1 - sum(shares)]) > LEVEL


def _abandon(engine: Engine, prompts: list[list[int]]) -> None:
    """Requests of every kind, each left after a few deltas."""
    draw = random.Random(5)
    loops = list(LOOPS.values())

    async def abandon(client: EngineClient, number: int, after: int) -> None:
        blend = engine_blend(loops[number % len(loops)])
        (request,) = requests([prompts[number % 50]], blend, f"left{number}", tokens=40, temperature=0.0)
        seen = 0
        stream = client.generate(request)
        async for _ in stream:
            seen += 1
            if seen == after:
                break
        await stream.aclose()  # type: ignore[attr-defined]

    async def all_of_them(client: EngineClient) -> None:
        await asyncio.gather(*(abandon(client, number, draw.randrange(1, 12)) for number in range(60)))

    asyncio.run_coroutine_threadsafe(all_of_them(engine.client), engine._loop).result(timeout=300)


def test_abandoned_at_any_moment(engine: Engine, prompts: list[list[int]]) -> None:
    """Nothing is left, on the shelf neither; and an id may be used again at once."""
    _abandon(engine, prompts)
    assert_empty(engine)


def test_a_prompt_per_member(engine: Engine, related: pairs.Served, prompts: list[list[int]]) -> None:
    """Greedy, and drawn with the noise of the base's position; alone, and as members of a blend."""
    own = [[3, *prompt[::2], 7] for prompt in prompts[:6]]
    for kind, temperature in ((None, 0.0), ("proxy", 0.0), ("mixture", 0.9)):
        loop = None if kind is None else LOOPS[kind]
        policy = "threshold" if kind is None else "always"
        items = []
        for number, prompt in enumerate(prompts[:6]):
            items += requests(
                [prompt],
                loop and engine_blend(loop),
                f"own{kind}{number}",
                policy=policy,
                prompts=((1, own[number]),),
                temperature=temperature,
                ignore_eos=True,
                run_ahead=3,
            )
        items = [
            msgspec.structs.replace(item, sampling=msgspec.structs.replace(item.sampling, seed=number))
            for number, item in enumerate(items)
        ]
        want = decode(
            Method(related.reference, loop, policy=policy),
            prompts[:6],
            24,
            seeds=list(range(6)),
            others={1: own},
            temperature=temperature,
            ignore_eos=True,
        )
        same(engine.generate(items), want)
    assert_empty(engine)


def test_guidance(related: pairs.Served, prompts: list[list[int]]) -> None:
    """Two rows of one lane."""
    negative = [[11, 4], [12], [50] * 7, [1, 2, 3], [9] * 40, [400, 2]]
    scheduler = {"guidance": True}
    with Engine(related.config(scheduler=scheduler, max_num_seqs=4)) as engine:
        for gamma, temperature in ((2.0, 0.0), (3.0, 0.9), (0.0, 0.0)):
            blend = Blend("product", ((0, gamma), (3, 1.0 - gamma)))
            items = [
                GenerationRequest(
                    f"{gamma}-{number}",
                    prompt,
                    SamplingSpec(seed=number, max_tokens=24, temperature=temperature, ignore_eos=True),
                    Collaboration(policy="always", blend=blend, prompts=((3, negative[number]),)),
                )
                for number, prompt in enumerate(prompts[:6])
            ]
            want = decode(
                Method(related.reference, blend_loop.guidance(gamma)),
                prompts[:6],
                24,
                seeds=list(range(6)),
                others={blend_loop.NEGATIVE: negative},
                temperature=temperature,
                ignore_eos=True,
            )
            for expected in want:
                # Here the negative prompt's lane is the last one.
                expected.support = [
                    told and {3 if member < 0 else member: value for member, value in told.items()}
                    for told in expected.support
                ]
            same(engine.generate(items), want)
        (one,) = engine.generate(requests([[1]], Blend("product", ((0, 2.0), (3, -1.0))), "no negative prompt"))
        assert one.error is not None
        assert "negative prompt" in one.error
        assert len(assert_empty(engine).lanes) == 3


def test_ties_go_to_the_lowest_id(engine: Engine, prompts: list[list[int]]) -> None:
    """A bias that makes two tokens equal beyond what float32 can tell apart."""
    bias = {9: 100.0, 400: 100.0}
    only = {"allowed_token_ids": (9, 400), "logit_bias": bias, "temperature": 0.0}
    blend = Blend("product", ((0, 1e-30), (1, 1e-30)))
    for one in engine.generate(requests(prompts[:4], blend, "tie", tokens=3, **only)):
        assert one.tokens == [9, 9, 9]


@pytest.mark.parametrize(
    ("blend", "more", "reason"),
    [
        (Blend("mixture", ((0, 0.5), (3, 0.5))), {}, "members that exist"),
        (Blend("mixture", ((0, 0.5), (1, 0.6))), {}, "sum to 1"),
        (Blend("mixture", ((0, -0.5), (1, 1.5))), {}, "at least 0"),
        (Blend("product", ((0, 11.0), (1, 1.0))), {}, "from -10 to 10"),
        (Blend("product", ((0, 0.0), (1, 0.0))), {}, "all weights are 0"),
        (Blend("product", ((0, 2.0), (1, 0.0))), {}, "no expert"),
        (Blend("product", ((0, 1.0), (1, 1.0)), anchor=2, plausibility=0.1), {}, "anchor"),
        (Blend("mixture", ((0, 0.5), (1, 0.5)), plausibility=0.1), {}, "for a product"),
        (Blend("union", ((0, 0.5), (1, 0.5)), top=0), {}, "top"),
        (Blend("union", ((0, 1.0), (1, 1.0)), from_gate=True), {}, "for a mixture"),
        (Blend("mixture", ((0, 0.5), (1, 0.5))), {"experts": (2,)}, "not among the experts"),
        (Blend("mixture", ((0, 0.5), (1, 0.5))), {"member": 1}, "a member alone"),
    ],
)
def test_refused(blend: Blend, more: dict[str, Any], reason: str, engine: Engine) -> None:
    (one,) = engine.generate(requests([[1]], blend, "refused", **more))
    assert one.finish_reason == "error"
    assert one.error is not None
    assert "blend: " in one.error
    assert reason in one.error


@pytest.mark.slow
@pytest.mark.parametrize("coordination", ["lockstep", "overlapped"])
def test_lanes_in_processes_of_their_own(
    coordination: str, related: pairs.Served, prompts: list[list[int]], form: Form
) -> None:
    """Texts over shared memory: the base in the engine's process, lanes one after the other; or the base in one of its
    own, an expert in two shards, and lanes at the same time. Nothing is left there."""
    fields = related.config(coordination=coordination, executor="mp", scheduler={"run_ahead": 4}).model_dump()
    if coordination == "overlapped":
        fields["base"]["executor"] = "mp"
        fields["experts"][0]["tensor_parallel_size"] = 2
    with Engine(EngineConfig.model_validate(fields)) as engine:
        assert engine.info.coordination == coordination
        for kind, loop in LOOPS.items():
            for parameters in QUICK:
                how = PARAMETERS[parameters]
                got = engine.generate(requests(prompts[:8], engine_blend(loop), f"{kind} {parameters}", **how))
                same(got, looped(related, loop, prompts[:8], form, **how))
        assert_empty(engine)
        _abandon(engine, prompts)
        how = PARAMETERS["grammar"]
        got = engine.generate(requests(prompts[:4], engine_blend(LOOPS["union"]), "after", **how))
        same(got, looped(related, LOOPS["union"], prompts[:4], form, **how))
        assert_empty(engine)


def test_without_shared_memory_blends_are_refused(related: pairs.Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else: the lanes start, and what is left free is named."""
    from engine.vllm_hooks import backend, load, shared_shelf

    def little(**_: int) -> None:
        raise OSError("/dev/shm has 1 MiB free, and 9 MiB are needed")

    monkeypatch.setattr(shared_shelf.SharedShelf, "create", little)
    monkeypatch.setattr(load, "load_lanes", lambda *_, **__: [])
    loaded = backend.load(
        related.config(executor="mp"),
        on_progress=lambda _: None,
        on_ready=lambda: None,
        on_failure=lambda _: None,
        templates=None,
        shelf=Shelf(),
    )
    assert loaded.shelf is None
    assert loaded.blend_obstacle == (
        "lanes in worker processes share their distributions in memory: /dev/shm has 1 MiB free, and 9 MiB are needed"
    )
