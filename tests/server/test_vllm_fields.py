"""vLLM's own request fields, with vLLM's meaning, before a scripted engine; the lanes' part is in tests/oracle.

Beside what the fields are documented to do, this follows what vLLM's own tests of its OpenAI server look at: shapes of
logprobs, what is echoed, what is truncated, what a stream leaves out.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.conftest import Build, House
from tests.server.fakes import A, check_error, events, letters, writes

SPECIAL = 1
"""Token id of ``<|user|>``."""


# -- what goes to the engine ----------------------------------------------------------------------------------


async def test_sampling_fields_reach_the_engine(house: House) -> None:
    fields: dict[str, Any] = {
        "allowed_token_ids": [70, 71, 70],
        "cache_salt": "mine",
        "prompt_logprobs": 3,
        "bad_words": ["quick", " quick", "zq"],
    }
    for answer in (await house.complete(**fields), await house.chat(**fields)):
        assert answer.status_code == 200, answer.text
    encode = house.service.tokenizer._encode
    for seen in house.engine.seen:
        sampling = seen.sampling
        assert sampling.allowed_token_ids == (70, 71, 70)
        assert sampling.cache_salt == "mine"
        assert sampling.prompt_logprobs == 3
        words = [list(word) for word in sampling.bad_words]
        assert encode("quick", False) in words
        assert encode("zq", False) in words
        # After a space the word has another first token and, in this vocabulary, as many of them.
        assert (encode(" quick", False) in words) == (len(encode(" quick", False)) == len(encode("quick", False)))
        assert encode(" zq", False) not in words


async def test_bad_words_and_allowed_tokens_keep_run_ahead_off() -> None:
    from engine.strategies.deferral.window import window_limit
    from engine.types import GenerationRequest, SamplingSpec

    assert window_limit(GenerationRequest("a", [1], SamplingSpec()), "auto") is None
    for spec in (SamplingSpec(bad_words=((1,),)), SamplingSpec(allowed_token_ids=(1,))):
        assert window_limit(GenerationRequest("a", [1], spec), "auto") == 0


# -- prompts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, slice(-3, None)),
        ({"truncate_prompt_tokens": 3, "truncation_side": "left"}, slice(-3, None)),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, slice(0, 3)),
        ({"truncate_prompt_tokens": 255}, slice(None)),
    ],
    ids=str,
)
async def test_truncation(house: House, fields: dict[str, Any], kept: slice) -> None:
    tokens = letters("abcdefgh")
    for prompt in (tokens, "abcdefgh"):
        answer = await house.complete(prompt=prompt, return_token_ids=True, echo=True, max_tokens=1, **fields)
        whole = house.service.tokenizer._encode("abcdefgh", True) if isinstance(prompt, str) else tokens
        choice = answer.json()["choices"][0]
        assert house.engine.seen[-1].prompt == choice["prompt_token_ids"] == whole[kept]
        # What is echoed is what was kept.
        assert choice["text"] == house.service.tokenizer.decode(whole[kept]) + "a"
        assert answer.json()["usage"]["prompt_tokens"] == len(whole[kept])


async def test_truncation_to_the_context(house: House) -> None:
    """-1 leaves room for a token; without it the prompt is refused."""
    check_error(await house.complete(prompt=letters("a") * 300, max_tokens=1), 400, "prompt")
    for prompt in (letters("a") * 300, "a " * 300):
        assert (await house.complete(prompt=prompt, max_tokens=1, truncate_prompt_tokens=-1)).status_code == 200
        assert len(house.engine.seen[-1].prompt) == 255
    long = [{"role": "user", "content": "a " * 400}]
    check_error(await house.chat(messages=long), 400, "messages")
    assert (await house.chat(messages=long, truncate_prompt_tokens=50)).status_code == 200
    rendered = house.engine.seen[-1].prompt
    assert len(rendered) == 50
    assert house.service.tokenizer.decode(rendered).endswith("\nassistant:")


async def test_truncation_keeps_special_tokens(build: Build) -> None:
    """A beginning of text stays, as in the tokenizers library's own truncation."""
    from tokenizers.processors import TemplateProcessing

    from server.text.tokenizer import TextTokenizer
    from tests.server.fakes import byte_level_tokenizer

    made = byte_level_tokenizer()
    made.post_processor = TemplateProcessing("<|user|> $A", special_tokens=[("<|user|>", SPECIAL)])
    house = await build()
    house.service.tokenizer = TextTokenizer(made)
    await house.complete(prompt="abcdefgh", max_tokens=1)
    begun, *rest = house.engine.seen[-1].prompt
    assert begun == SPECIAL
    await house.complete(prompt="abcdefgh", max_tokens=1, truncate_prompt_tokens=3)
    assert house.engine.seen[-1].prompt == [SPECIAL, *rest[-2:]]
    await house.complete(prompt="abcdefgh", max_tokens=1, add_special_tokens=False, truncate_prompt_tokens=3)
    assert house.engine.seen[-1].prompt == rest[-3:]
    await house.chat(max_tokens=1, add_special_tokens=True)
    assert house.engine.seen[-1].prompt[0] == SPECIAL


async def test_generation_prompt_and_continued_message(house: House) -> None:
    def prompt() -> str:
        return house.service.tokenizer.decode(house.engine.seen[-1].prompt, skip_special_tokens=False)

    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "well "}]
    await house.chat(messages=messages)
    assert prompt() == "<|user|>user: hi\n<|user|>assistant: well \nassistant:"
    await house.chat(messages=messages, add_generation_prompt=False)
    assert prompt() == "<|user|>user: hi\n<|user|>assistant: well \n"
    for more in ({}, {"add_generation_prompt": False}):
        await house.chat(messages=messages, continue_final_message=True, **more)
        assert prompt() == "<|user|>user: hi\n<|user|>assistant: well "


async def test_variables_and_documents_for_the_template(build: Build) -> None:
    from server.text.chat_template import ChatTemplate

    house = await build()
    house.service.chat_template = ChatTemplate(
        "{% if style is defined %}{{ style }}:{% endif %}{% for d in documents or [] %}[{{ d.text }}]{% endfor %}"
        "{{ messages[0].content | trim }}",
        {"eos_token": "</s>"},
    )

    async def prompt(**fields: Any) -> str:
        assert (await house.chat(**fields)).status_code == 200
        return house.service.tokenizer.decode(house.engine.seen[-1].prompt)

    assert await prompt() == "hi"
    assert await prompt(chat_template_kwargs={"style": "brief", "unused": {"a": [1]}}) == "brief:hi"
    assert await prompt(documents=[{"text": "one"}, {"text": "two"}]) == "[one][two]hi"
    # A template that trims messages: nothing is left of the mark, nor of the space.
    spaced = [{"role": "user", "content": " hi  "}]
    assert await prompt(messages=spaced, continue_final_message=True) == "hi"
    check_error(await house.chat(chat_template_kwargs={"tools": []}), 400, "messages")


@pytest.mark.parametrize("place", ["documents", "chat_template_kwargs"])
async def test_special_tokens_in_what_the_template_gets_are_text(build: Build, place: str) -> None:
    from server.text.chat_template import ChatTemplate

    house = await build()
    source = "<|user|>{{ documents[0].text if documents else style }}"
    house.service.chat_template = ChatTemplate(source, {})
    house.service.guard = house.service.tokenizer.guard(source)
    sent = [{"text": "<|user|>"}] if place == "documents" else {"style": "<|user|>"}
    assert (await house.chat(**{place: sent})).status_code == 200
    prompt = house.engine.seen[-1].prompt
    assert prompt[0] == SPECIAL
    assert SPECIAL not in prompt[1:]
    assert house.service.tokenizer.decode(prompt) == "<|user|>"


# -- text -----------------------------------------------------------------------------------------------------


async def test_special_tokens_are_shown_on_request(build: Build) -> None:
    tokens = [*letters("ab"), SPECIAL, *letters("c")]
    house = await build(writes(tokens))
    for stream in (False, True):
        for skip, text in ((None, "abc"), (True, "abc"), (False, "ab<|user|>c")):
            answer = await house.complete(max_tokens=4, skip_special_tokens=skip, stream=stream)
            chunks = events(answer.text)[:-1] if stream else [answer.json()]
            assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
    # Then a special token may be a stop string, too.
    answer = await house.complete(max_tokens=4, skip_special_tokens=False, stop="<|user|>")
    assert answer.json()["choices"][0]["text"] == "ab"


# -- logprobs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 5, 20])
async def test_logprobs_as_token_ids(house: House, count: int) -> None:
    fields = {"logprobs": count, "max_tokens": 2, "return_tokens_as_token_ids": True, "echo": True}
    logprobs = (await house.complete(prompt=letters("xy"), **fields)).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [f"token_id:{token}" for token in letters("xyab")]
    assert logprobs["top_logprobs"][0] is None
    for token, top in zip(logprobs["tokens"][1:], logprobs["top_logprobs"][1:], strict=True):
        assert token in top
        assert max(count, 1) <= len(top) <= count + 1
        assert all(name.startswith("token_id:") for name in top)
    chat = await house.chat(logprobs=True, top_logprobs=count, max_tokens=2, return_tokens_as_token_ids=True)
    content = chat.json()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [f"token_id:{token}" for token in letters("ab")]
    assert all(len(entry["top_logprobs"]) == count for entry in content)
    assert content[0]["bytes"] == [ord("a")]


@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize("echo", [False, True])
async def test_prompt_logprobs(house: House, count: int, echo: bool) -> None:
    """By token id, the prompt's own token always among them; null for the first, of which nothing is known."""
    prompts = [letters("xyz"), letters("w")]
    fields: dict[str, Any] = {"prompt_logprobs": count, "max_tokens": 1, "echo": echo, "n": 2}
    if echo:
        fields["logprobs"] = 2
    choices = (await house.complete(prompt=prompts, **fields)).json()["choices"]
    assert len(choices) == 4
    for number, choice in enumerate(choices):
        prompt = prompts[number // 2]
        first, *rest = choice["prompt_logprobs"]
        assert first is None
        assert len(rest) == len(prompt) - 1
        for token, entry in zip(prompt[1:], rest, strict=True):
            assert max(count, 1) <= len(entry) <= count + 1
            own = entry[str(token)]
            assert own["rank"] == 1
            assert own["logprob"] == -0.25
            assert own["decoded_token"] == chr(token - A + ord("a"))
        if echo:  # as many as were asked for in each place
            assert all(len(top) <= 3 for top in choice["logprobs"]["top_logprobs"][1:])
    chat = (await house.chat(prompt_logprobs=count, max_tokens=1)).json()
    assert chat["prompt_logprobs"][0] is None
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]


async def test_prompt_logprobs_without_writing(house: House) -> None:
    choice = (await house.complete(prompt=letters("xyz"), prompt_logprobs=1, max_tokens=0, echo=True)).json()[
        "choices"
    ][0]
    assert choice["text"] == "xyz"
    assert len(choice["prompt_logprobs"]) == 3
    assert choice["logprobs"] is None


async def test_a_ranked_answer_has_no_more_logprobs_than_asked_for(house: House) -> None:
    choice = (await house.complete(best_of=2, logprobs=1, max_tokens=2, prompt_logprobs=0)).json()["choices"][0]
    assert all(len(top) <= 2 for top in choice["logprobs"]["top_logprobs"])


# -- ids ------------------------------------------------------------------------------------------------------


async def test_a_clients_request_id(house: House) -> None:
    assert (await house.complete(request_id="mine-7")).json()["id"] == "cmpl-mine-7"
    assert (await house.chat(request_id="mine-7")).json()["id"] == "chatcmpl-mine-7"
    # Two requests of one id do not get in each other's way.
    assert len({seen.request_id for seen in house.engine.seen}) == 2
