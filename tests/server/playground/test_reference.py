"""The API reference in a real browser."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from tests.live import LiveServer
from tests.server.playground.conftest import KEY, Open
from tests.server.playground.page import ENTER, Page
from tests.waiting import eventually

pytestmark = pytest.mark.browser

MODEL = "collm-demo"


def try_out(page: Page, method: str, path: str, body: dict[str, Any] | None = None) -> str:
    """Send a route's form, with another body where one is given; gives the answer that is shown."""
    [section] = [
        each
        for each in page.all(".route")
        if each.find_element("css selector", "h2").get_attribute("textContent") == f"{method}{path}"
    ]

    def part(selector: str) -> Any:
        return section.find_element("css selector", f".try {selector}")

    page.js("arguments[0].open = true", part("summary").find_element("xpath", ".."))
    if body is not None:
        page.js("arguments[0].value = arguments[1]", part("textarea"), json.dumps(body))
    part("button[type=submit]").click()
    eventually(lambda: part(".answer-status").text.endswith("ms"))
    return str(part(".answer").get_attribute("textContent"))


def test_reference_shows_every_route(demo: LiveServer, open_page: Open) -> None:
    page = open_page(f"{demo.url}/docs")
    paths = httpx.get(f"{demo.url}/openapi.json").json()["paths"]
    eventually(lambda: len(page.all(".route")) == sum(map(len, paths.values())))
    titles = [title.get_attribute("textContent") for title in page.all(".route h2")]
    assert {re.sub("^[A-Z]+", "", title) for title in titles} == set(paths)
    assert "threshold" in page.js("return document.body.textContent")
    assert page.console() == []
    assert [r["url"] for r in page.requests() if not r["url"].startswith(f"{demo.url}/")] == []


def test_routes_can_be_tried_out(demo: LiveServer, open_page: Open) -> None:
    page = open_page(f"{demo.url}/docs")
    eventually(lambda: len(page.all(".route")) > 5)
    answer = json.loads(try_out(page, "POST", "/v1/completions"))
    assert answer["model"] == MODEL
    assert answer["usage"]["completion_tokens_details"]["expert_tokens"] > 0
    question = [{"role": "user", "content": "Which currency codes does Iceland Krona have?"}]
    stream = try_out(
        page, "POST", "/v1/chat/completions", {"model": MODEL, "messages": question, "stream": True, "temperature": 0}
    )
    assert stream.startswith("data: {")
    assert stream.endswith("data: [DONE]\n\n")
    assert json.loads(try_out(page, "GET", "/v1/models/{id}"))["id"] == MODEL
    assert try_out(page, "GET", "/metrics").startswith("# HELP")
    assert json.loads(try_out(page, "POST", "/detokenize"))["prompt"]
    refused = json.loads(try_out(page, "POST", "/v1/completions", {"model": "nobody", "prompt": ""}))
    assert set(refused["error"]) == {"message", "type", "param", "code"}
    assert [r["url"] for r in page.requests() if not r["url"].startswith(f"{demo.url}/")] == []


def test_the_reference_asks_for_the_key_too(keyed: str, open_page: Open) -> None:
    page = open_page(f"{keyed}/docs")
    eventually(lambda: page.one("#key").is_displayed())
    assert page.all(".route") == []
    page.keys("#key", KEY, ENTER)
    eventually(lambda: len(page.all(".route")) > 5)
    assert not page.one("#key").is_displayed()
    answer = try_out(page, "GET", "/version")
    assert "version" in json.loads(answer)
