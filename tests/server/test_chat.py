from __future__ import annotations

import json
from pathlib import Path

import openai
import pytest

from server.text.chat_template import ChatTemplate, ChatTemplateError
from server.text.tokenizer import TextTokenizer, TokenizerError
from tests.server.conftest import Build, House
from tests.server.fakes import byte_level_tokenizer, check_error, events, letters, writes


async def test_the_template_makes_the_prompt(house: House, tokenizer: TextTokenizer) -> None:
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "ok", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "<|end|>"},
    ]
    response = await house.chat(messages=messages)
    assert response.status_code == 200, response.text
    begin = "<|user|>system: be kind\n<|user|>user: one two\n<|user|>assistant: ok\n<|user|>user: "
    prompt = house.engine.seen[0].prompt
    assert prompt == [*tokenizer._encode(begin, False), *plain("<|end|>\nassistant:")]
    assert tokenizer.decode(prompt, skip_special_tokens=False) == f"{begin}<|end|>\nassistant:"


def plain(text: str) -> list[int]:
    """Token ids of a text in which no special token is one."""
    tokenizer = byte_level_tokenizer()
    tokenizer.encode_special_tokens = True
    ids: list[int] = tokenizer.encode(text).ids
    return ids


async def test_the_shape_of_a_response(house: House) -> None:
    body = (await house.chat(max_completion_tokens=3, collaboration={"report": True}, return_token_ids=True)).json()
    assert body["object"] == "chat.completion"
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "abc", "refusal": None}
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    assert choice["collaboration"]["sources"] == ["base", "codes", "base"]
    assert choice["token_ids"] == letters("abc")
    assert body["prompt_token_ids"] == house.engine.seen[0].prompt
    assert body["usage"]["completion_tokens_details"] == {"base_tokens": 2, "expert_tokens": 1}


async def test_the_default_limit_is_the_context(house: House) -> None:
    await house.chat()
    request = house.engine.seen[0]
    assert request.sampling.max_tokens == 256 - len(request.prompt)


async def test_logprobs(house: House) -> None:
    body = (await house.chat(max_tokens=2, logprobs=True, top_logprobs=2)).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["a", "b"]
    assert content[0]["bytes"] == [97]
    assert [len(entry["top_logprobs"]) for entry in content] == [2, 2]
    assert content[0]["top_logprobs"][0] == {"token": "a", "logprob": -0.25, "bytes": [97]}
    plain = (await house.chat(max_tokens=2, logprobs=True)).json()
    assert plain["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


@pytest.mark.parametrize("n", [1, 2])
async def test_a_stream_joined_is_the_whole_response(build: Build, tokenizer: TextTokenizer, n: int) -> None:
    house = await build(writes(tokenizer._encode("Hello 日本 😀 STOP x", True)))
    fields = {
        "n": n, "stop": ["STOP"], "logprobs": True, "collaboration": {"report": True}, "return_token_ids": True,
        "max_tokens": 60,
    }  # fmt: skip
    whole = (await house.chat(**fields)).json()
    response = await house.chat(stream=True, stream_options={"include_usage": True}, **fields)
    *chunks, usage, done = events(response.text)
    assert done == "[DONE]"
    assert usage["usage"] == whole["usage"]
    assert usage["choices"] == []
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    for choice in whole["choices"]:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in c["delta"] for c in own[1:])
        assert "".join(c["delta"].get("content", "") for c in own) == choice["message"]["content"] == "Hello 日本 😀 "
        assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + ["stop"]
        assert [entry for c in own[1:] for entry in c["logprobs"]["content"]] == choice["logprobs"]["content"]
        assert [source for c in own[1:] for source in c["collaboration"]["sources"]] == choice["collaboration"][
            "sources"
        ]


async def test_the_openai_client(house: House) -> None:
    client = openai.AsyncOpenAI(base_url="http://house/v1", api_key="none", http_client=house.http)
    answer = await client.chat.completions.create(
        model="collm-demo", messages=[{"role": "user", "content": "hi"}], max_completion_tokens=4
    )
    assert answer.choices[0].message.content == "abcd"
    # An answer's message can be sent back as it came.
    again = await client.chat.completions.create(
        model="collm-demo",
        messages=[answer.choices[0].message.model_dump(), {"role": "user", "content": "more"}],  # type: ignore[list-item]
        max_completion_tokens=1,
    )
    assert again.choices[0].message.content == "a"


async def test_without_a_template_chat_says_so(house: House) -> None:
    house.service.chat_template = None
    assert check_error(await house.chat(), 400, "messages")["code"] == "no_chat_template"


async def test_what_the_template_refuses_is_the_client_s_to_mend(house: House) -> None:
    error = check_error(await house.chat(messages=[{"role": "developer", "content": "x"}]), 400, "messages")
    assert "no developer here" in error["message"]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<s>"})


def test_templates_have_what_hugging_face_gives_them() -> None:
    one = [{"role": "user", "content": "<é>"}]
    assert template("{{ bos_token }}{{ messages | tojson }}").render(one) == '<s>[{"role": "user", "content": "<é>"}]'
    assert template("  {% if true %}\nx{% endif %}").render(one) == "x"
    assert template("{% for m in messages %}{% break %}{% endfor %}y").render(one) == "y"
    assert len(template("{{ strftime_now('%Y') }}").render(one)) == 4


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages[7].content }}",
    ],
)
def test_templates_are_kept_in_their_sandbox(source: str) -> None:
    try:
        shown = template(source).render([{"role": "user", "content": "x"}])
    except ChatTemplateError:
        return
    assert "class" not in shown


@pytest.mark.parametrize("where", ["config", "named", "file"])
def test_templates_are_found(tmp_path: Path, where: str) -> None:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    config: dict[str, object] = {"bos_token": {"content": "<s>"}}
    if where == "named":
        config["chat_template"] = [
            {"name": "tools", "template": "no"},
            {"name": "default", "template": "{{ bos_token }}"},
        ]
    else:
        config["chat_template"] = "{{ bos_token }}" if where == "config" else "no"
    if where == "file":
        (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = ChatTemplate.find(TextTokenizer.load(str(tmp_path)))
    assert found is not None
    assert found.render([]) == "<s>"


def test_a_damaged_template_is_an_error_at_the_start() -> None:
    with pytest.raises(TokenizerError, match="chat template"):
        template("{% if %}")
