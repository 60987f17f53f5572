"""A pair whose members have vocabularies of their own, and texts that are written by characters."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engine.blends import Blend
from engine.types import Collaboration, Delta, GenerationRequest, WrittenWord
from server.app import create_app
from server.service import Service
from server.text.tokenizer import TextTokenizer
from tests.server.conftest import Build, House
from tests.server.fakes import FakeEngine, check_error, events, settings

PIECES = [b"sm", b"\xc3", b"\xb6rg\xc3\xa5", b"s \xf0\x9f\x99\x82", b"!"]
SUPPORT = [[-0.5, -0.7], [-1.0, float("nan")], [-2.0, -0.1], [-0.1, -0.1], [-0.3, -0.2]]
OWN_TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


def by_characters(request: GenerationRequest) -> list[Delta]:
    """Pieces, one delta each."""
    found = [
        Delta("", [-1], [source], [None], support=[(0, support)], texts=[piece])
        for piece, support, source in zip(PIECES, SUPPORT, (0, 0, 1, 0, 1), strict=True)
    ]
    found[-1].finish_reason = "stop"
    return found


def by_words(request: GenerationRequest) -> list[Delta]:
    """Two words of the expert's and a token of the base's; a stop string holds the second word back for a while."""
    return [
        Delta("", [12, 13], [1, 1], [0.75, None], words=[WrittenWord(0, 2, 1, -0.5)]),
        Delta("", [14, 15, 16], [0, 1, 1], [0.25, 0.5, None], words=[WrittenWord(1, 2, 1, -1.5)]),
        Delta("", [17], [0], [None], finish_reason="length"),
    ]


@pytest.fixture
async def spelled(tokenizer: TextTokenizer, tmp_path: Path) -> AsyncIterator[House]:
    """The expert has single bytes in the order of their values, then one end of text, and a template of its own."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    expert = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    expert.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    expert.decoder = decoders.ByteLevel()
    expert.add_special_tokens(["<end>"])
    expert.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": OWN_TEMPLATE}))
    service = Service(settings(), tokenizer)
    engine = FakeEngine(by_characters, gate=False)
    base, codes = engine.info.lanes
    lanes = [
        msgspec.structs.replace(base, vocab_size=330, eos_token_ids=[0]),
        msgspec.structs.replace(codes, vocab_size=257, eos_token_ids=[256], tokenizer=str(tmp_path), max_model_len=128),
    ]
    engine.info = msgspec.structs.replace(
        engine.info, lanes=lanes, vocabularies="spelled", strategies=("characters",), max_model_len=128
    )
    service.read_tokenizers(engine.info)
    service.attach(engine)
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://house") as http:
        yield House(http, engine, service)
    service.close()


async def test_each_member_reads_the_prompt_in_its_own_tokens(spelled: House, tokenizer: TextTokenizer) -> None:
    await spelled.complete(prompt=["Hello", "Wörter"], max_tokens=5)
    own = spelled.service.text_of(1).tokenizer
    for request, prompt in zip(spelled.engine.seen, ("Hello", "Wörter"), strict=True):
        assert request.prompt == await tokenizer.encode(prompt)
        assert dict(request.collaboration.prompts) == {1: await own.encode(prompt)}
        assert request.collaboration.strategy == "characters"


async def test_each_member_reads_messages_by_its_own_template(spelled: House) -> None:
    await spelled.chat(messages=[{"role": "user", "content": "hi <end>"}])
    (request,) = spelled.engine.seen
    own = spelled.service.text_of(1).tokenizer
    assert own.decode(dict(request.collaboration.prompts)[1], skip_special_tokens=False) == "[hi <end>]"
    assert 256 not in dict(request.collaboration.prompts)[1], "a special token in a message is text"
    assert "user: hi" in spelled.service.tokenizer.decode(request.prompt)


async def test_a_member_alone_is_served_in_its_own_tokens(spelled: House) -> None:
    await spelled.complete(model="collm-demo/codes", prompt=[72, 256], max_tokens=5, logit_bias={"256": 1})
    (request,) = spelled.engine.seen
    assert (request.prompt, request.collaboration) == ([72, 256], Collaboration(member=1))
    for fields, param in (
        ({"prompt": [257]}, "prompt"),
        ({"logit_bias": {"257": 1}}, "logit_bias"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
        ({"prompt": "a" * 120, "max_tokens": 9}, "max_tokens"),
    ):
        check_error(await spelled.complete(model="collm-demo/codes", **fields), 400, param)
    answer = await spelled.http.post("/tokenize", json={"prompt": "Hi", "model": "collm-demo/codes"})
    assert (answer.json()["count"], answer.json()["max_model_len"]) == (2, 128)


@pytest.mark.parametrize(
    ("fields", "way_out"),
    [({"prompt": [1, 2]}, "send text, or ask one alone."), ({"top_k": 2}, "leave it out, or ask a member alone.")],
)
async def test_a_refusal_says_the_way_out(spelled: House, fields: dict[str, Any], way_out: str) -> None:
    error = check_error(await spelled.complete(**fields), 400, next(iter(fields)))
    assert error["message"].endswith(way_out)


async def test_the_smallest_room_counts(spelled: House) -> None:
    """120 tokens of the expert's 128, fewer of the base's 256."""
    await spelled.complete(prompt="hello " * 20, max_tokens=8)
    assert spelled.engine.seen[-1].sampling.max_tokens == 8
    error = check_error(await spelled.complete(prompt="hello " * 20, max_tokens=9), 400, "max_tokens")
    assert "120 in 'prompt'" in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [1, 2]}, "prompt"),
        ({"logit_bias": {"1": 1}}, "logit_bias"),
        ({"stop_token_ids": [1]}, "stop_token_ids"),
        ({"allowed_token_ids": [1]}, "allowed_token_ids"),
        ({"bad_words": ["a"]}, "bad_words"),
        ({"logprobs": 0}, "logprobs"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"echo": True, "logprobs": 1}, "logprobs"),
        ({"return_token_ids": True}, "return_token_ids"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"best_of": 2}, "best_of"),
        ({"truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
        ({"top_p": 0.9}, "top_p"),
        ({"top_k": 2}, "top_k"),
        ({"min_p": 0.1}, "min_p"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"collaboration": {"policy": "always"}}, "collaboration.policy"),
        ({"collaboration": {"blend": "mixture"}}, "collaboration.blend"),
        ({"collaboration": {"strategy": "deferral"}}, "collaboration.strategy"),
        ({"collaboration": {"weights": {"base": 0.5, "codes": 0.4}}}, "collaboration.weights"),
        ({"collaboration": {"weights": {"nobody": 1}}}, "collaboration.weights"),
        ({"collaboration": {"average": "median"}}, "collaboration.average"),
    ],
)
async def test_what_is_refused_names_its_field(spelled: House, fields: dict[str, Any], param: str) -> None:
    check_error(await spelled.complete(**fields), 400, param)
    assert spelled.engine.seen == []


async def test_what_asks_for_nothing_is_taken(spelled: House) -> None:
    answer = await spelled.complete(
        top_p=1, top_k=-1, presence_penalty=0, repetition_penalty=1, logit_bias={}, stop_token_ids=[], best_of=1,
        collaboration={"strategy": "characters", "weights": {"codes": 1.0}, "average": "geometric"},
    )  # fmt: skip
    assert answer.status_code == 200
    (request,) = spelled.engine.seen
    assert (request.collaboration.weights, request.collaboration.average) == (((1, 1.0),), "geometric")


async def test_pieces_are_reported_and_counted(spelled: House) -> None:
    answer = (await spelled.complete(collaboration={"report": True})).json()
    (choice,) = answer["choices"]
    text = b"".join(PIECES).decode()
    assert choice["text"] == text == "smörgås 🙂!"
    report = choice["collaboration"]
    assert report["tokens"] == ["sm", "", "örgå", "s 🙂", "!"]
    assert report["sources"] == ["base", "base", "codes", "base", "codes"]
    assert report["pieces"][1] == {"text": "", "start": 2, "end": 3, "support": {"base": -1.0}, "dropped": ["codes"]}
    assert report["pieces"][-1]["end"] == len(text.encode())
    assert answer["usage"]["completion_tokens"] == 5
    assert answer["usage"]["completion_tokens_details"] == {
        "base_tokens": 3, "expert_tokens": 2, "text_bytes": len(text.encode()),
    }  # fmt: skip
    assert await spelled.metric("collm_tokens_total", model_name="collm-demo", source="codes", policy="alone") == 2


@pytest.mark.parametrize("stop", [None, "gå", "🙂"])
async def test_a_stream_never_breaks_a_character(spelled: House, stop: str | None) -> None:
    fields = {"collaboration": {"report": True}, **({"stop": stop} if stop else {})}
    whole = (await spelled.complete(**fields)).json()["choices"][0]
    events = (await spelled.complete(stream=True, **fields)).text.split("\n\n")
    chunks = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events if event.startswith("data: {")]
    assert all("\ufffd" not in chunk["text"] for chunk in chunks)
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    assert [piece for chunk in chunks for piece in chunk["collaboration"]["pieces"]] == whole["collaboration"]["pieces"]


async def test_it_is_said_who_spells(spelled: House) -> None:
    card = (await spelled.http.get("/v1/models/collm-demo")).json()["collaboration"]
    assert (card["vocabularies"], card["strategies"], card["blends"]) == ("spelled", ["characters"], [])
    assert (await spelled.http.get("/version")).json()["vocabularies"] == "spelled"


async def test_words_of_experts_are_reported(spelled: House) -> None:
    spelled.engine.script = by_words
    spelled.engine.info = msgspec.structs.replace(spelled.engine.info, strategies=("deferral",))
    body = {"max_tokens": 6, "collaboration": {"report": True}}
    whole = (await spelled.complete(**body)).json()["choices"][0]["collaboration"]
    words = [(word["start"], word["length"], word["member"], word["logprob"]) for word in whole["words"]]
    assert words == [(0, 2, "codes", -0.5), (3, 2, "codes", -1.5)]
    assert whole["sources"] == ["codes", "codes", "base", "codes", "codes", "base"]
    assert whole["deferral_probabilities"] == [0.75, None, 0.25, 0.5, None, None]
    # A stop string that might begin in the second word holds its tokens back: one chunk less, and the word with them.
    response = await spelled.complete(**body, stream=True, stop=whole["tokens"][3] + "?")
    streamed, before = [], 0
    for event in events(response.text):
        for choice in [] if event == "[DONE]" else event["choices"]:
            chunk = choice["collaboration"]
            streamed += [(word["start"] + before, word["length"]) for word in chunk.get("words", ())]
            before += len(chunk["tokens"])
    assert streamed == [(0, 2), (3, 2)]


async def test_a_union_is_the_blend_of_different_vocabularies(spelled: House) -> None:
    spelled.engine.script = lambda _: [
        Delta("", [12, 13, 14], [-1, -1, 0], [0.9, None, 0.9], support=[(0, [-0.5, -1.5])], finish_reason="length")
    ]
    spelled.engine.info = msgspec.structs.replace(spelled.engine.info, strategies=("deferral", "characters"))
    half = {"base": 0.5, "codes": 0.5}
    union = {"kind": "union", "weights": half, "top": 5, "score": "first", "align": False}
    body = (await spelled.complete(max_tokens=3, collaboration={"blend": union, "report": True})).json()
    told = spelled.engine.seen[-1].collaboration
    assert told.blend == Blend("union", ((0, 0.5), (1, 0.5)), top=5, score="first", align=False)
    assert [lane for lane, _ in told.prompts] == [1]
    report = body["choices"][0]["collaboration"]
    assert report["sources"] == ["blend", "blend", "base"]
    assert report["support"] == [{"base": -0.5, "codes": -1.5}, None, None]
    assert body["usage"]["completion_tokens_details"] == {"base_tokens": 1, "expert_tokens": 0, "blended_tokens": 2}
    card = (await spelled.http.get("/v1/models/collm-demo")).json()["collaboration"]
    assert card["blends"] == ["union"]
    for fields, param, word in (
        ({"collaboration": {"blend": "mixture"}}, "collaboration.blend", "needs one vocabulary"),
        (
            {"collaboration": {"blend": {"kind": "mixture", "score": "mass"}}},
            "collaboration.blend",
            "not for a mixture",
        ),
        ({"collaboration": {"blend": "union"}, "presence_penalty": 1}, "presence_penalty", "strings"),
        ({"collaboration": {"blend": "union"}, "logprobs": 1}, "logprobs", "tokens"),
        ({"collaboration": {"blend": {"kind": "union", "score": "last"}}}, None, "score"),
    ):
        error = check_error(await spelled.complete(**fields), 400, param) if param else None
        answer = (await spelled.complete(**fields)).json()["error"]["message"]
        assert word in (error["message"] if error else answer)


async def test_what_is_for_different_vocabularies_is_refused_where_they_are_the_same(build: Build) -> None:
    house = await build()
    for field in ({"score": "mass"}, {"align": True}):
        refused = await house.complete(collaboration={"blend": {"kind": "union", **field}})
        assert "share one" in check_error(refused, 400, "collaboration.blend")["message"]
