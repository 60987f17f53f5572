from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

from server.text.detokenize import StreamDetokenizer
from server.text.tokenizer import TextTokenizer, TokenizerError
from tests.server.conftest import Build, House
from tests.server.fakes import byte_level_tokenizer, check_error


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
    long = asyncio.create_task(house.http.post("/tokenize", json={"prompt": "word " * 300_000}))
    answered = 0
    while not long.done():
        assert (await house.http.get("/health")).status_code == 200
        await asyncio.sleep(0)
        answered += 1
    assert long.result().status_code == 200
    # One would be answered before it begins, and one after its end.
    assert answered > 3


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
    assert isinstance(detokenizer, StreamDetokenizer)
    tokens = [2, 3, 4, 1, *(6 + byte for byte in "日😀".encode()), 5]
    parts = [detokenizer.push(token) for token in tokens]
    assert "".join(parts) + detokenizer.flush() == tokenizer.decode(tokens) == "Hello world 日😀!"
    assert all("\ufffd" not in part for part in parts)
    assert tokenizer.token_text(3) == " wor"
    assert tokenizer.token_text(6 + 0xE6) == "bytes:\\xe6"
    assert tokenizer.token_bytes(6 + 0xE6) == b"\xe6"
