from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

from engine.checkpoints import locate
from engine.errors import CheckpointError
from server.protocol.tokenize import MAX_TEXT_LENGTH, MAX_TOKENS
from server.text.detokenize import TableDetokenizer
from server.text.tokenizer import TextTokenizer, TokenizerError
from tests.server.conftest import Build, House
from tests.server.fakes import byte_level_tokenizer, check_error, events
from tests.waiting import until


@pytest.mark.parametrize("text", ["Hello there", "été 日本 😀", "", "<|end|>x"])
async def test_there_and_back(house: House, tokenizer: TextTokenizer, text: str) -> None:
    body = (await house.http.post("/tokenize", json={"prompt": text})).json()
    assert body["tokens"] == tokenizer._encode(text, True)
    assert body["count"] == len(body["tokens"])
    assert body["max_model_len"] == 256
    assert body["token_strs"] is None
    back = (await house.http.post("/detokenize", json={"tokens": body["tokens"], "model": "collm-demo/base"})).json()
    assert back == {"prompt": text.replace("<|end|>", "")}


async def test_token_strings(house: House) -> None:
    body = (await house.http.post("/tokenize", json={"prompt": "é日", "return_token_strs": True})).json()
    assert len(body["token_strs"]) == body["count"]
    assert all("\ufffd" not in text for text in body["token_strs"])


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": 3}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": "a", "model": "nope"}, 404, "model"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, 400, "add_special_tokens"),
        ("/tokenize", {"prompt": "a" * (MAX_TEXT_LENGTH + 1)}, 400, "prompt"),
        ("/detokenize", {"tokens": [1] * (MAX_TOKENS + 1)}, 400, "tokens"),
        ("/detokenize", {"tokens": [512]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": "a"}, 400, "tokens"),
        ("/detokenize", {"tokens": [], "model": "nope"}, 404, "model"),
    ],
)
async def test_bad_input(house: House, path: str, body: object, status: int, param: str) -> None:
    check_error(await house.http.post(path, json=body), status, param)


async def test_while_loading(build: Build) -> None:
    house = await build(attach=False)
    check_error(await house.http.post("/tokenize", json={"prompt": "a"}), 503)


async def test_tokenising_leaves_the_event_loop_free(house: House) -> None:
    long = asyncio.create_task(house.http.post("/tokenize", json={"prompt": "word " * 200_000}))
    answered = 0
    while not long.done():
        assert (await house.http.get("/health")).status_code == 200
        await asyncio.sleep(0)
        answered += 1
    assert long.result().status_code == 200
    # One would be answered before it begins, and one after its end.
    assert answered > 3


@pytest.fixture
def held(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Texts and sequences that are long are not worked on before this is set."""
    go = threading.Event()
    for name in ("_encode", "decode"):
        work = getattr(tokenizer, name)

        def slow(given: str | list[int], *more: object, work: object = work) -> object:
            assert len(given) < 1000 or go.wait(60)
            return work(given, *more)  # type: ignore[operator]

        monkeypatch.setattr(tokenizer, name, slow)
    yield go
    go.set()


LONG = [("/tokenize", {"prompt": "a " * 1000}), ("/detokenize", {"tokens": [72] * 1000})]


def flood(house: House, count: int) -> list[asyncio.Task[httpx.Response]]:
    """So many requests, of both kinds, that take long."""
    return [asyncio.create_task(house.http.post(path, json=body)) for path, body in LONG * (count // 2)]


async def test_prompts_do_not_wait_behind_them(house: House, held: threading.Event) -> None:
    waiting = flood(house, 12)
    for _ in range(100):
        await asyncio.sleep(0)
    async with asyncio.timeout(30):
        response = await house.complete(stream=True, max_tokens=8)
        chat = await house.chat(max_tokens=8)
    *chunks, done = events(response.text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abcdefgh"
    assert done == "[DONE]"
    assert chat.status_code == 200
    assert not any(task.done() for task in waiting)
    held.set()
    assert {response.status_code for response in await asyncio.gather(*waiting)} == {200}


async def test_a_stream_goes_on_beside_them(house: House) -> None:
    """The same with real work: the stream is complete long before they are."""
    body = {"prompt": "word " * 60_000, "return_token_strs": True}
    waiting = [asyncio.create_task(house.http.post("/tokenize", json=body)) for _ in range(12)]
    for _ in range(100):
        await asyncio.sleep(0)
    assert (await house.complete(stream=True, max_tokens=8)).status_code == 200
    assert sum(task.done() for task in waiting) < 6
    assert {response.status_code for response in await asyncio.gather(*waiting)} == {200}


async def test_the_queue_is_bounded_and_leaves_room_for_others(build: Build, held: threading.Event) -> None:
    keys = {"api_keys": ["flood", "other"]}
    house = await build(server={"max_queued_tokenize_requests": 3, "queue_reserve": 0.5, **keys})
    house.http.headers["Authorization"] = "Bearer flood"
    waiting = flood(house, 10)
    await until(lambda: sum(task.done() for task in waiting) >= 6)
    refused = [task.result() for task in waiting if task.done()]
    assert len(refused) == 6
    for response in refused:
        assert check_error(response, 429)["code"] == "overloaded"
        assert int(response.headers["retry-after"]) >= 1
    other = asyncio.create_task(
        house.http.post("/tokenize", json={"prompt": "a"}, headers={"Authorization": "Bearer other"})
    )
    held.set()
    assert (await other).status_code == 200
    statuses = [response.status_code for response in await asyncio.gather(*waiting)]
    assert sorted(statuses) == [200] * 4 + [429] * 6
    assert house.service.tokenizing.in_flight == 0
    # None of them was to generate anything.
    assert await house.metric("collm_requests_total", model_name="collm-demo", outcome="rejected") == 0


async def test_who_hangs_up_gives_its_place_back(build: Build, held: threading.Event) -> None:
    house = await build(server={"max_queued_tokenize_requests": 3, "queue_reserve": 0})
    waiting = flood(house, 4)
    await until(lambda: house.service.tokenizing.in_flight == 4)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert house.service.tokenizing.in_flight == 0


async def test_long_work_is_not_the_event_loop_s(
    house: House, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each token costs is paid elsewhere: its text here, its place in an echoed prompt there."""
    on_the_loop: list[str] = []
    here = threading.current_thread()

    def noted(name: str, work: object) -> object:
        def noting(*given: object) -> object:
            if threading.current_thread() is here:
                on_the_loop.append(name)
            return work(*given)  # type: ignore[operator]

        return noting

    detokenizer = tokenizer.detokenizer

    def detokenizers(*given: object, **how: object) -> object:
        made = detokenizer(*given, **how)  # type: ignore[arg-type]
        made.push = noted("push", made.push)  # type: ignore[method-assign, assignment]
        return made

    monkeypatch.setattr(tokenizer, "token_text", noted("token_text", tokenizer.token_text))
    monkeypatch.setattr(tokenizer, "decode", noted("decode", tokenizer.decode))
    monkeypatch.setattr(tokenizer, "detokenizer", detokenizers)
    await house.http.post("/tokenize", json={"prompt": "Hello there", "return_token_strs": True})
    await house.http.post("/detokenize", json={"tokens": [72, 73]})
    for prompt in (["Hello there"] * 3, [[72, 73]] * 3):
        assert (await house.complete(prompt=prompt, echo=True, max_tokens=0)).status_code == 200
    assert on_the_loop == []


def test_truncation_in_the_file_is_switched_off(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = TextTokenizer.load(str(tmp_path / "tokenizer.json"))
    assert loaded.decode(loaded._encode("a longer text", True)) == "a longer text"
    assert len(loaded._encode("a", True)) == 1


@pytest.mark.parametrize("damage", ["missing", "folder", "tokenizer", "config", "config-list"])
def test_what_cannot_be_loaded_is_one_line(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if damage in ("config", "config-list"):
        byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text("{" if damage == "config" else "[]")
    if damage == "tokenizer":
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": None}))
    location = tmp_path / "nowhere" if damage == "missing" else tmp_path
    with pytest.raises(TokenizerError) as caught:
        TextTokenizer.load(str(location))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("tokenizer: ")


@pytest.mark.parametrize("location", ["nowhere/at/all", "nowhere"])
def test_a_base_that_is_nowhere_is_told_as_check_tells_it(
    tmp_path: Path, location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = tmp_path / location if "/" in location else location
    with pytest.raises(CheckpointError) as checked:
        locate(model)
    with pytest.raises(TokenizerError) as started:
        TextTokenizer.load(str(model), setting="base.model")
    assert str(started.value) == f"base.model: {checked.value}"


def sentencepiece_like() -> Tokenizer:
    vocabulary = {"<unk>": 0, "▁": 1, "▁Hello": 2, "▁wor": 3, "ld": 4, "!": 5}
    vocabulary |= {f"<0x{byte:02X}>": 6 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def test_a_vocabulary_that_is_not_byte_level() -> None:
    tokenizer = TextTokenizer(sentencepiece_like())
    detokenizer = tokenizer.detokenizer()
    assert isinstance(detokenizer, TableDetokenizer)
    tokens = [2, 3, 4, 1, *(6 + byte for byte in "日😀".encode()), 5]
    parts = [detokenizer.push(token) for token in tokens]
    assert "".join(parts) + detokenizer.flush() == tokenizer.decode(tokens) == "Hello world 日😀!"
    assert all("\ufffd" not in part for part in parts)
    assert tokenizer.token_text(3) == " wor"
    assert tokenizer.token_text(6 + 0xE6) == "bytes:\\xe6"
    assert tokenizer.token_bytes(6 + 0xE6) == b"\xe6"
