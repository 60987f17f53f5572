"""LoRA adapters as experts write what a float32 loop over Hugging Face models and peft writes, token for token."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.check import report
from engine.composed.artifact import CONFIG_KEY
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.offline import Engine
from engine.types import Collaboration, GenerationRequest, SamplingSpec, StructuredOutputs
from engine.vllm_hooks.load import make_plan
from tests.oracle.adapters import Adapted, adapted_model, adapted_pair, save_adapter
from tests.oracle.blended import LOOPS, PARAMETERS, engine_blend, looped, requests, same
from tests.oracle.checks import LOG_PROBABILITY, assert_empty, assert_same, preemptions, run
from tests.oracle.pairs import PRESSED
from tests.oracle.reference import Pair, Written, greedy

TOKENS = 40


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return adapted_pair(tmp_path_factory.mktemp("adapted"))


@pytest.fixture(scope="module")
def expected(pair: Adapted, prompts: list[list[int]]) -> list[Written]:
    return [greedy(pair.served.reference, prompt, TOKENS) for prompt in prompts[:24]]


@pytest.fixture(scope="module")
def engine(pair: Adapted) -> Iterator[Engine]:
    with Engine(pair.config()) as engine:
        yield engine


def _requests(prompts: list[list[int]], tag: str, **collaboration: Any) -> list[GenerationRequest]:
    sampling = SamplingSpec(temperature=0.0, max_tokens=TOKENS)
    how = Collaboration(**collaboration)
    return [GenerationRequest(f"{tag}-{number}", prompt, sampling, how) for number, prompt in enumerate(prompts)]


@pytest.mark.parametrize("run_ahead", ["off", "auto", 4])
def test_the_pair_equals_the_oracle(
    run_ahead: Any, engine: Engine, prompts: list[list[int]], expected: list[Written]
) -> None:
    """Together, and then alone: the prefix cache has what each wrote, under the name of its adapter."""
    assert {source for one in expected for source in one.sources} == {0, 1, 2}
    before = engine.stats if run_ahead != "off" else None
    requests = _requests(prompts[:24], f"batch-{run_ahead}", run_ahead=run_ahead)
    assert_same(run(engine, requests, 24), expected)
    assert_same(run(engine, _requests(prompts[:6], f"alone-{run_ahead}", run_ahead=run_ahead), 1), expected[:6])
    after = assert_empty(engine)
    if before is None:
        assert after.runahead_accepted + after.runahead_discarded == 0
    else:
        assert after.runahead_accepted > before.runahead_accepted
        assert after.runahead_discarded > before.runahead_discarded


def test_each_member_alone_in_one_batch(pair: Adapted, engine: Engine, prompts: list[list[int]]) -> None:
    """Rows of the base and of all adapters side by side: none is computed with another one's matrices."""
    reference = pair.served.reference
    members = [reference.base, *reference.experts]
    requests = [
        GenerationRequest(
            f"{member}-{number}",
            prompts[number],
            SamplingSpec(temperature=0.0, max_tokens=20),
            Collaboration(member=member),
        )
        for number in range(4)
        for member in (0, 1, 2)
    ]
    found = engine.generate(requests)
    for request, one in zip(requests, found, strict=True):
        member = request.collaboration.member
        assert member is not None
        alone = Pair(members[member], [], reference.theta, reference.bias, 0)
        assert one.tokens == _alone(alone, request.prompt, 20)
        assert set(one.sources) == {member}
    texts = {tuple(one.tokens) for one in found[:3]}
    assert len(texts) == 3, "the adapters change nothing"


def _alone(pair: Pair, prompt: list[int], tokens: int) -> list[int]:
    return greedy(Pair(pair.base, [pair.base], pair.theta[:1], pair.bias[:1], 0), prompt, tokens, policy="never").tokens


def test_a_step_is_shared(engine: Engine, prompts: list[list[int]]) -> None:
    """With many rows some are deferred at any time, and no step is only theirs."""
    # So that there is an account, whichever test comes first.
    run(engine, _requests(prompts[:1], "before"), 1)
    before = assert_empty(engine)
    requests = [
        GenerationRequest(
            f"shared-{number}",
            [*prompts[number], 9],
            SamplingSpec(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, seed=number),
            Collaboration(policy="random", rate=0.3, run_ahead="off"),
        )
        for number in range(24)
    ]
    done = engine.generate(requests)
    after = assert_empty(engine)
    written = sum(map(bool, (source for one in done for source in one.sources)))
    guests = sum(lane.steps for lane in after.lanes[1:]) - sum(lane.steps for lane in before.lanes[1:])
    assert written > 100
    assert guests > 20
    # If adapters had steps of their own, these would come on top of the base's, which are as many as a text has tokens.
    assert after.lanes[0].steps - before.lanes[0].steps < guests + TOKENS
    assert sum(len(lane.step_seconds) for lane in after.lanes[1:]) == 0


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in ("mixture by the gate", "proxy") else [pytest.mark.slow])
        for kind in LOOPS
    ],
)
def test_blends_with_adapters(kind: str, pair: Adapted, engine: Engine, prompts: list[list[int]]) -> None:
    """Members that are rows of one step: what each says at a position reaches the one that writes in a later step."""
    blend, loop = engine_blend(LOOPS[kind]), LOOPS[kind]
    for parameters in ("greedy", "sampled"):
        fields = {"tokens": 20, "run_ahead": "off" if parameters == "greedy" else 4, **PARAMETERS[parameters]}
        got = engine.generate(requests(prompts[:6], blend, f"{kind} {parameters}", **fields))
        # The loop's adapters are merged into the weights, which rounds otherwise: 2.7e-4 was seen.
        same(got, looped(pair.served, loop, prompts[:6], **fields), tolerance=5 * LOG_PROBABILITY)
    assert_empty(engine)


def test_pressed_for_memory(pair: Adapted, prompts: list[list[int]], expected: list[Written]) -> None:
    """Prompts in pieces, too little memory for all, aborts in between: the same texts, and nothing is left."""
    said: list[str] = []
    with Engine(pair.config(**PRESSED, scheduler={"run_ahead": 4}), on_progress=said.append) as engine:
        (warned,) = [line for line in said if "over and over" in line]
        assert warned.startswith("base: the KV cache holds ")
        assert_same(run(engine, _requests(prompts[:24], "pressed"), 24), expected)
        assert preemptions(engine)[0] > 0

        async def drop(number: int) -> None:
            request = GenerationRequest(
                f"dropped-{number}",
                [*prompts[number], 3],
                SamplingSpec(temperature=0.0, max_tokens=60, ignore_eos=True),
                Collaboration(policy="random", rate=0.5),
            )
            task = asyncio.ensure_future(anext(engine.client.generate(request)))
            await asyncio.sleep(number * 0.004)
            await engine.client.abort([request.request_id])
            await asyncio.gather(task, return_exceptions=True)

        async def drop_all() -> None:
            await asyncio.gather(*(drop(number) for number in range(40)))

        asyncio.run_coroutine_threadsafe(drop_all(), engine._loop).result(timeout=300)
        assert_empty(engine)
        assert_same(run(engine, _requests(prompts[:8], "after"), 8), expected[:8])


def test_seeds_log_probabilities_and_forms(engine: Engine, prompts: list[list[int]]) -> None:
    def ask(tag: str, **more: Any) -> list[Any]:
        sampling = SamplingSpec(temperature=1.0, seed=11, max_tokens=24, **more)
        how = Collaboration(policy="random", rate=0.5)
        requests = [GenerationRequest(f"{tag}-{number}", prompts[number], sampling, how) for number in range(6)]
        done = engine.generate(requests)
        assert not [one.error for one in done if one.error]
        return done

    first, again = ask("seed", logprobs=3), ask("again", logprobs=3)
    assert [one.tokens for one in first] == [one.tokens for one in again]
    assert all(len(one.logprobs or ()) == len(one.tokens) for one in first)
    assert all(set(one.sources) - {0} for one in first)
    digits = ask("form", structured_outputs=StructuredOutputs(regex="[0-9]{12}"))
    for one in digits:
        # Bytes are ids 1 to 256 of the tests' tokenizer, in the order of its alphabet.
        assert len(one.tokens) in (12, 13)
        assert len(set(one.tokens[:12]) | set(digits[0].tokens[:12])) <= 10
        assert set(one.sources) - {0}
    assert_empty(engine)


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["uni", "mp"])
def test_lanes_of_their_own_write_the_same(
    executor: str, pair: Adapted, prompts: list[list[int]], expected: list[Written]
) -> None:
    with Engine(pair.config(own_lanes=True, executor=executor)) as engine:
        assert_same(run(engine, _requests(prompts[:24], "own"), 24), expected)
        assert_empty(engine)


@pytest.mark.slow
def test_the_base_may_be_an_adapter_too_and_workers_processes(
    pair: Adapted, prompts: list[list[int]], tmp_path: Path
) -> None:
    """One backbone, adapters for all that is written with it; a whole model beside them, overlapped."""
    served = pair.served
    save_adapter(served.base, tmp_path / "base-adapter", 9, strength=0.2)
    own = adapted_model(served.reference.base, tmp_path / "base-adapter")
    reference = Pair(own, served.reference.experts, served.reference.theta, served.reference.bias, 0)
    expected = [greedy(reference, prompt, TOKENS) for prompt in prompts[:12]]
    fields = pair.config().model_dump()
    fields["base"] |= {"adapter": str(tmp_path / "base-adapter"), "executor": "mp"}
    with Engine(EngineConfig.model_validate(fields)) as engine:
        assert engine.info.lanes[0].adapter == str(tmp_path / "base-adapter")
        assert_same(run(engine, _requests(prompts[:12], "adapted-base"), 12), expected)
        assert_empty(engine)


def _edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "adapter_config.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return edit


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    from safetensors.torch import load_file, save_file

    def edit(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        tensors = load_file(str(file))
        change(tensors)
        save_file(tensors, str(file))

    return edit


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_edited(lambda c: c.update(peft_type="PREFIX_TUNING")), "peft_type is 'PREFIX_TUNING'; LORA is served"),
        (_edited(lambda c: c.update(use_dora=True)), "is a DoRA adapter; merge it into a copy of its model"),
        (_edited(lambda c: c.update(modules_to_save=["lm_head"])), r"whole layers of its own \(modules_to_save\)"),
        (_edited(lambda c: c.update(bias="all")), r"has biases of its own \(bias\)"),
        (_edited(lambda c: c.update(init_lora_weights="pissa_niter_4")), "init_lora_weights is 'pissa_niter_4'"),
        (_edited(lambda c: c.update(r=1024)), "its rank is 1024; up to 512 can be served"),
        (_edited(lambda c: c.pop("r")), "field r: no rank is found there"),
        (
            _tensors(lambda t: t.update({A.replace("layers.0", "layers.7"): t[A].clone()})),
            "adapts layer 7 of a model with more than the 2 layers of ",
        ),
        (_tensors(lambda t: t.update({A: torch.zeros(5, 64)})), "adapts a model of hidden size 64; .* has 128"),
        (_tensors(lambda t: t.update({"x.lora_embedding_A": torch.zeros(5, 64)})), "x.lora_embedding_A is no matrix"),
        (
            _tensors(lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(5, 128)})),
            r"adapts the vocabulary's layers \(lm_head\)",
        ),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x"), "cannot be read as safetensors"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    damage: Callable[[Path], None], message: str, pair: Adapted, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(pair.served.experts["adapter1"], folder)
    damage(folder)
    fields = pair.config().model_dump()
    fields["experts"][0]["adapter"] = str(folder)
    with pytest.raises(ConfigError, match=rf"^experts\.adapter1\.adapter: .*{message}"):
        make_plan(EngineConfig.model_validate(fields))


def test_an_adapter_named_as_a_model_is_told_apart(pair: Adapted) -> None:
    fields = pair.config().model_dump()
    fields["experts"][0].update({"model": fields["experts"][0]["adapter"], "adapter": None})
    with pytest.raises(ConfigError, match=r"experts\.adapter1\.model: .* is a LoRA adapter: name it as "):
        make_plan(EngineConfig.model_validate(fields))


def test_the_check_says_whose_weights_an_adapter_uses(pair: Adapted) -> None:
    lines = list(report(pair.config()))
    (guest,) = [line for line in lines if line.startswith("adapter1: ")]
    assert "LoRA adapter of base's weights, in its steps; rank 5 on down_proj, q_proj, v_proj; " in guest
    own = [line for line in report(pair.config(own_lanes=True)) if line.startswith("adapter1: ")]
    assert len(own) == 2
    assert "LoRA adapter; rank 5" in own[1]


def test_a_composed_model_takes_no_adapters(pair: Adapted, tmp_path: Path) -> None:
    shutil.copytree(pair.served.base, tmp_path / "composed")
    file = tmp_path / "composed" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {CONFIG_KEY: {}}))
    fields = pair.config().model_dump()
    fields["base"]["model"] = str(tmp_path / "composed")
    # The base is looked at first; its own damage is not what is told here.
    fields["base"]["adapter"] = str(pair.served.experts["adapter1"])
    with pytest.raises(ConfigError, match=r"^base\.adapter: .*composed is a composed model, which takes no adapters"):
        make_plan(EngineConfig.model_validate(fields))
