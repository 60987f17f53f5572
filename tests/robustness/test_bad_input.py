"""Cases 1 to 12 of the fault list: bad input, as one table against the live server.

Every row is answered with an error object that names the field, or says why the body is none; a good request is
answered afterwards, and both lanes are at zero.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.robustness import raw
from tests.robustness.servers import LONG, MODEL, PROMPTS, FaultServer, check_error, check_error_body

GOOD: dict[str, Any] = {"model": MODEL, "prompt": "Hello", "max_tokens": 4}
Row = tuple[int, bytes, str | None]
"""Number of the case, body, and the field that the error must name."""


def fields(case: int, param: str | None, **changes: Any) -> Row:
    """A good body with changed fields."""
    return case, json.dumps({**GOOD, **changes}).encode(), param


def literal(case: int, param: str | None, name: str, value: str) -> Row:
    """A good body with one field's JSON written by hand."""
    body = {key: item for key, item in GOOD.items() if key != name}
    return case, (json.dumps(body)[:-1] + f', "{name}": {value}}}').encode(), param


def body(case: int, content: bytes) -> Row:
    return case, content, None


TABLE: list[Row] = [
    # 1: no JSON, or no object
    *(body(1, content) for content in (b"", b" ", b"{", b'{"model": ', b"nonsense", b"{'model': 1}", b'{"a": 1,}')),
    *(body(1, content) for content in (b"null", b"[]", b"3", b'"text"', b"true", b"{} {}", b"[" + b"{}" + b"]")),
    # 2: what parsers choke on
    body(2, b'{"model": "\xff\xfe", "prompt": "x"}'),
    body(2, b"\x00" * 100),
    body(2, b"\xef\xbb\xbf" + json.dumps(GOOD).encode()),
    body(2, b"[" * 100_000),
    body(2, b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    literal(2, None, "prompt", "[" * 100_000 + "]" * 100_000),
    literal(2, None, "max_tokens", "9" * 5000),
    literal(2, None, "seed", "-" + "9" * 5000),
    literal(2, None, "temperature", "9" * 5000),
    literal(2, None, "temperature", "1e" + "9" * 5000),
    # 3: numbers that are none, text that is none
    *(literal(3, None, "temperature", value) for value in ("NaN", "Infinity", "-Infinity", "1e999")),
    literal(3, None, "logit_bias", '{"5": NaN}'),
    literal(3, None, "prompt", r'"\ud800"'),
    literal(3, None, "prompt", r'["ok", "\udfff and more"]'),
    literal(3, None, "stop", r'"\ud83d"'),
    # 6: prompts
    (6, json.dumps({"model": MODEL}).encode(), "prompt"),
    *(fields(6, "prompt", prompt=value) for value in ("", [], [[]], [""], ["a", ""], [[1], []], None, {}, 7)),
    *(fields(6, "prompt", prompt=value) for value in (["a", 1], [[1], "a"], [1, [2]], [None], ["x"] * 1025)),
    fields(6, "prompt", prompt=[[1]] * 1025),
    # 7: token ids and lengths
    *(fields(7, "prompt", prompt=value) for value in ([-1], [1024], [10**6], [2**63], [2**70], [[1], [-1]], [1.5])),
    fields(7, "prompt", prompt=[True]),
    fields(7, "prompt", prompt=[1] * 1024),
    fields(7, "prompt", prompt=[[1, 2], [1] * 2000]),
    fields(7, "prompt", prompt="word " * 5000),
    fields(7, "max_tokens", prompt=[1] * 1000, max_tokens=100),
    # 8: max_tokens
    *(fields(8, "max_tokens", max_tokens=value) for value in (-1, 0, 10**9, 2**31, "abc", "16", True, 1.5, [], {})),
    # 9: sampling numbers
    *(fields(9, "temperature", temperature=value) for value in (-1, 3, 2.0001, "1", True, [])),
    *(fields(9, "top_p", top_p=value) for value in (0, 1.5, -0.1, "x", False)),
    *(fields(9, "n", n=value) for value in (0, 10**6, 129, -1, 1.5, "2", True)),
    *(fields(9, "logprobs", logprobs=value) for value in (21, 10**6, -2, "a", True, 1.5)),
    *(fields(9, "seed", seed=value) for value in (2**63, -(2**63) - 1, 10**40, "1", 0.5, True)),
    *(fields(9, "top_k", top_k=value) for value in (-2, 1.5, "1", 2**40)),
    *(fields(9, "min_p", min_p=value) for value in (-0.1, 1.1)),
    *(fields(9, "presence_penalty", presence_penalty=value) for value in (-2.1, 2.1)),
    *(fields(9, "frequency_penalty", frequency_penalty=value) for value in (-2.1, 2.1)),
    *(fields(9, "repetition_penalty", repetition_penalty=value) for value in (0, -1)),
    # 10: stop, stream_options, logit_bias
    *(fields(10, "stop", stop=value) for value in (list("abcdefghijklmnopq"), "", [""], ["a", ""], 3, [3], "x" * 5000)),
    fields(10, "stop_token_ids", stop_token_ids=[-1]),
    fields(10, "stop_token_ids", stop_token_ids=[1024]),
    fields(10, "stream_options", stream_options={"include_usage": True}),
    fields(10, "stream_options", stream_options={"include_usage": True}, stream=False),
    fields(10, "stream_options", stream_options={"nonsense": True}, stream=True),
    *(fields(10, "logit_bias", logit_bias={key: 1}) for key in ("1024", "-1", "a", "1.0", " 1", "9" * 5000, "٣", "")),
    *(fields(10, "logit_bias", logit_bias={"5": value}) for value in (1000, -1000, 101, "1", None, True, [])),
    fields(10, "logit_bias", logit_bias=[1]),
    # 11: what is not supported is named, never ignored
    fields(11, "suffix", suffix="x"),
    fields(11, "best_of", best_of=1, n=2),
    fields(11, "best_of", best_of=3, stream=True),
    fields(11, "best_of", best_of=21),
    fields(11, "response_format", response_format={"type": "magic"}),
    fields(11, "response_format", response_format={"type": "json_schema"}),
    fields(11, "response_format", response_format={"type": "json_schema", "json_schema": 1}),
    fields(11, "structured_outputs", structured_outputs={}),
    fields(11, "structured_outputs", structured_outputs={"regex": "a", "choice": ["a"]}),
    fields(11, "structured_outputs", structured_outputs={"regex": "x" * 70_000}),
    fields(11, "structured_outputs", structured_outputs={"regex": "("}),
    fields(11, "structured_outputs", structured_outputs={"grammar": "root ::= nothing"}),
    fields(11, "structured_outputs", structured_outputs={"json": "{"}, stream=True),
    fields(11, "structured_outputs", structured_outputs={"choice": []}),
    fields(11, "structured_outputs", response_format={"type": "json_object"}, structured_outputs={"regex": "a"}),
    fields(11, "collaboration.policy", collaboration={"policy": "magic"}),
    fields(11, "collaboration.threshold", collaboration={"threshold": 2}),
    fields(11, "collaboration.threshold", collaboration={"threshold": -0.1}),
    fields(11, "collaboration.rate", collaboration={"policy": "random", "rate": 1.1}),
    fields(11, "collaboration.max_expert_tokens", collaboration={"max_expert_tokens": -1}),
    fields(11, "collaboration.experts", collaboration={"experts": ["nobody"]}),
    fields(11, "collaboration.experts", collaboration={"experts": ["base"]}),
    fields(11, "collaboration.experts", collaboration={"experts": ["codes", "codes"]}),
    fields(11, "collaboration.whatever", collaboration={"whatever": 1}),
    fields(11, "collaboration", collaboration="always"),
    fields(11, "collaboration.policy", model=f"{MODEL}/base", collaboration={"policy": "always"}),
    *(fields(11, name, **{name: 1}) for name in ("guided_json", "use_beam_search", "nonsense", "priority")),
    # no media, no templates, no embeddings, no code: lessons of this field's advisories
    *(
        fields(11, name, **{name: value})
        for name, value in {
            "prompt_embeds": "AAAA",
            "chat_template": "{{ 7 * 7 }}",
            "chat_template_kwargs": {"chat_template": "x"},
            "kv_transfer_params": {"remote_host": "house"},
            "logits_processors": ["os.system"],
            "allowed_token_ids": [],
            "vllm_xargs": {"a": 1},
            "cache_salt": "",
        }.items()
    ),
    # 12: refused before the stream's headers are sent
    fields(12, "logprobs", logprobs=21, stream=True),
    fields(12, "logprobs", logprobs=10**9, stream=True),
    fields(12, "prompt", prompt=[10**6], stream=True),
    fields(12, "collaboration.experts", collaboration={"experts": ["nobody"]}, stream=True),
]


@pytest.fixture(autouse=True)
def _ends_well(live: FaultServer) -> Any:
    yield
    live.check_good()


@pytest.mark.parametrize("case", sorted({row[0] for row in TABLE}))
def test_table(live: FaultServer, case: int) -> None:
    wrong = []
    for number, content, param in TABLE:
        if number != case:
            continue
        reply = raw.send(live, raw.post(live, content))
        try:
            assert reply.status == 400
            assert reply.headers["content-type"] == "application/json"
            assert check_error_body(reply.json(), param=param)["type"] == "invalid_request_error"
        except AssertionError:
            wrong.append((content[:200], param, reply.status, reply.body[:300]))
    assert not wrong


def test_chat_has_the_same_limits(live: FaultServer) -> None:
    good = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    picture = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}]
    rows: list[tuple[str, dict[str, Any]]] = [
        ("messages", {"messages": []}),
        ("messages", {"messages": [{"role": "nobody", "content": "x"}]}),
        ("messages", {"messages": [{"role": "user"}]}),
        ("messages", {"messages": [{"role": "user", "content": picture}]}),
        ("messages", {"messages": [{"role": "user", "content": "word " * 5000}]}),
        ("messages", {"messages": [{"role": "user", "content": "x"}] * 5000}),
        ("top_logprobs", {"top_logprobs": 21, "logprobs": True}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("tools", {"tools": [{"type": "function"}]}),
        ("response_format", {"response_format": {"type": "magic"}}),
        ("max_completion_tokens", {"max_completion_tokens": 0}),
        ("n", {"n": 10**6}),
        ("chat_template", {"chat_template": "{{ cycler.__init__.__globals__ }}"}),
        ("add_generation_prompt", {"add_generation_prompt": True, "continue_final_message": True}),
        ("collaboration.policy", {"collaboration": {"policy": "magic"}}),
    ]
    with live.http() as http:
        for param, change in rows:
            check_error(http.post("/v1/chat/completions", json={**good, **change}), 400, param=param)


def test_4_wrong_content_type(live: FaultServer) -> None:
    with live.http() as http:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "x"):
            response = http.post("/v1/completions", content=json.dumps(GOOD), headers={"Content-Type": kind})
            check_error(response, 400, 415)


def test_5_unknown_model_path_and_method(live: FaultServer) -> None:
    with live.http() as http:
        for name in ("gpt-2", "", f"{MODEL}/", f"{MODEL}/nobody", f"{MODEL}/base/x", "../../etc/passwd", "x" * 10_000):
            check_error(http.post("/v1/completions", json={**GOOD, "model": name}), 404, param="model")
        for kind in (None, 7, ["a"], {}):
            check_error(http.post("/v1/completions", json={**GOOD, "model": kind}), 400, param="model")
        for path in ("/v2/completions", "/v1", "/v1/completions/", "/v1/models/gpt-2", "/v1/embeddings", "/..%2fetc"):
            check_error(http.get(path), 404, 405)
        for method, path in (("GET", "/v1/completions"), ("DELETE", "/v1/models"), ("PUT", "/metrics"), ("BREW", "/")):
            check_error(http.request(method, path), 404, 405)
        assert http.head("/v1/completions").status_code == 405


def test_errors_do_not_echo_what_was_sent(live: FaultServer) -> None:
    """A body may hold a secret or a megabyte; neither belongs into a message, nor into the log."""
    secret = "my-secret-" + "s" * 300
    rows = [
        {"model": secret},
        {"temperature": secret},
        {"stop": [secret, ""]},
        {secret: 1},
        {"logit_bias": {secret: 1}},
        {"collaboration": {"experts": [secret]}},
        {"prompt": [secret, 3]},
        {"user": [secret]},
    ]
    with live.http() as http:
        for row in rows:
            response = http.post("/v1/completions", json={**GOOD, **row})
            check_error(response, 400, 404)
            assert secret not in response.text
        response = http.post("/v1/completions", content=f'{{"prompt": "{secret}", "model": ')
        check_error(response, 400)
        assert "my-secret" not in response.text
    assert secret not in live.output()


def test_caps(live: FaultServer) -> None:
    """What is within each field's limits but too much together is refused at once, before any of it is tokenised."""
    with live.http() as http:
        response = http.post("/v1/completions", json={**GOOD, "prompt": ["x"] * 1024, "n": 128})
        check_error(response, 400, 429)
        response = http.post("/v1/completions", json={**GOOD, "prompt": ["x"] * 1024, "best_of": 20})
        check_error(response, 400, 429)
    response = live.complete("Hello", max_tokens=1, logprobs=5, n=16)
    assert response.status_code == 200
    assert len(response.json()["choices"]) == 16
    assert max(len(top) for top in response.json()["choices"][0]["logprobs"]["top_logprobs"]) <= 6


def test_bad_requests_do_not_disturb_good_ones(live: FaultServer) -> None:
    """A good stream runs while the table is thrown at the server; its text is what it is without."""
    alone = live.text(PROMPTS[2], max_tokens=200, ignore_eos=True)
    body = {"model": MODEL, "prompt": PROMPTS[2], "temperature": 0, "stream": True, **LONG, "max_tokens": 200}
    body["collaboration"] = {}
    text = ""
    with live.http() as http, http.stream("POST", "/v1/completions", json=body) as response:
        for number, line in enumerate(response.iter_lines()):
            if number < len(TABLE) * 2 and number % 4 == 0:
                raw.send(live, raw.post(live, TABLE[number // 4 % len(TABLE)][1]))
            if line.startswith("data: {"):
                text += "".join(choice["text"] for choice in json.loads(line[6:])["choices"])
    assert text == alone
