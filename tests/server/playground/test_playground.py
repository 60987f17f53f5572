"""The playground in a real browser: against the demo pair, and against slow stand-ins for what takes time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.types import Delta, GenerationRequest
from tests.live import LiveServer
from tests.server.commands.servers import MODEL as STANDIN
from tests.server.fakes import byte_level_tokenizer, deltas_of, writes
from tests.server.playground.conftest import KEY, Open, scripted
from tests.server.playground.page import CTRL, DOWN, END, ENTER, ESCAPE, HOME, RIGHT, TAB, Page
from tests.waiting import eventually

pytestmark = pytest.mark.browser

MODEL = "collm-demo"
PROMPT = "Question: Which currency codes does Iceland Krona have?\nAnswer:"


def reported(address: str, model: str, **collaboration: Any) -> list[tuple[str, str, float | None]]:
    """What the API says of the same request."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 64, "temperature": 0}
    response = httpx.post(
        f"{address}/v1/completions", json={**body, "collaboration": {"report": True, **collaboration}}
    )
    report = response.json()["choices"][0]["collaboration"]
    return list(zip(report["tokens"], report["sources"], report["deferral_probabilities"], strict=True))


def check_same(shown: list[tuple[str, str, float | None]], expected: list[tuple[str, str, float | None]]) -> None:
    """Tokens and sources are equal; probabilities too, up to what another batch does to floats."""
    assert [token[:2] for token in shown] == [token[:2] for token in expected]
    for (_, _, seen), (_, _, told) in zip(shown, expected, strict=True):
        assert seen == (told if told is None else pytest.approx(told, abs=1e-4))


def test_page_loads_and_asks_nobody_else(demo: LiveServer, open_page: Open) -> None:
    page = open_page(demo.url)
    page.run()
    assert page.console() == []
    urls = {request["url"] for request in page.requests()}
    assert f"{demo.url}/static/app.js" in urls
    assert [url for url in urls if not url.startswith(f"{demo.url}/")] == []
    policy = httpx.get(demo.url).headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")


def test_sources_are_those_of_the_api_and_models_stand_side_by_side(demo: LiveServer, open_page: Open) -> None:
    page = open_page(demo.url)
    assert [card.get_attribute("data-model") for card in page.all(".card")] == [
        MODEL,
        f"{MODEL}/base",
        f"{MODEL}/codes",
        f"{MODEL}/arithmetic",
    ]
    page.ask(PROMPT)
    page.run()
    for model in (MODEL, f"{MODEL}/base", f"{MODEL}/codes", f"{MODEL}/arithmetic"):
        check_same(page.tokens(model), reported(demo.url, model))
    sources = [source for _, source, _ in page.tokens(MODEL)]
    assert {"base", "codes"} == set(sources)
    assert page.figure(MODEL, "rate") == f"{100 * sources.count('codes') / len(sources):.0f} %"
    assert page.figure(MODEL, "tokens") == str(len(sources))
    assert float(page.figure(MODEL, "speed")) > 0
    joint, *members = (card.rect["y"] for card in page.all(".card"))
    assert len(set(members)) == 1
    assert joint < members[0]


def test_cards_can_be_left_out(demo: LiveServer, open_page: Open) -> None:
    page = open_page(demo.url)
    page.one(f"#models input[value='{MODEL}/codes']").click()
    page.requests()
    page.run()
    bodies = page.posted()
    assert sorted(body["model"] for body in bodies) == [MODEL, f"{MODEL}/arithmetic", f"{MODEL}/base"]
    assert not page.one(f"[data-model='{MODEL}/codes']").is_displayed()


def test_threshold_1_leaves_everything_to_the_base(demo: LiveServer, open_page: Open) -> None:
    page = open_page(demo.url)
    page.ask(PROMPT)
    page.run()
    assert page.figure(MODEL, "rate") != "0 %"
    page.keys("#threshold", END)
    assert page.one("#threshold-value").text == "1.00"
    assert "0 of" in page.one(f"[data-model='{MODEL}'] .trace-caption").text
    page.run()
    assert {source for _, source, _ in page.tokens(MODEL)} == {"base"}
    check_same(page.tokens(MODEL), reported(demo.url, MODEL, threshold=1))
    assert [t[:2] for t in page.tokens(MODEL)] == [t[:2] for t in page.tokens(f"{MODEL}/base")]
    assert page.figure(MODEL, "rate") == "0 %"
    page.one("#threshold-reset").click()
    assert page.one("#threshold-value").text.endswith("the gate's")


def test_run_again_when_a_setting_changes(demo: LiveServer, open_page: Open) -> None:
    page = open_page(demo.url)
    page.ask(PROMPT)
    page.run()
    page.one("#auto").click()
    page.one("#policy option[value='always']").click()
    eventually(lambda: "base" not in {source for _, source, _ in page.tokens(MODEL)})
    page.wait()
    assert not page.one("#threshold-field").is_displayed()


def test_examples_run(demo: LiveServer, open_page: Open) -> None:
    page = open_page(demo.url)
    page.all("#examples button")[1].click()
    page.wait()
    assert page.one("#prompt").get_attribute("value") == "Question: What are the country codes of Switzerland?\nAnswer:"
    assert "".join(text for text, _, _ in page.tokens(MODEL)).endswith("756.")


def test_keyboard_alone_is_enough(demo: LiveServer, open_page: Open) -> None:
    page = open_page(demo.url)
    page.keys("#prompt", CTRL, ENTER)
    page.wait()
    answer = page.one(f"[data-model='{MODEL}'] .text")
    page.js("arguments[0].focus()", answer)
    answer.send_keys(RIGHT)
    text, source, p = page.tokens(MODEL)[0]
    tip = page.one(f"[data-model='{MODEL}'] .tip")
    assert p is not None
    assert "gate " in tip.text
    assert source in tip.text
    told = page.one(f"[data-model='{MODEL}'] [aria-live]").get_attribute("textContent")
    assert told.startswith(f"“{text.replace(' ', '␣')}”, {source}, gate ")
    answer.send_keys(DOWN)
    assert page.one(".token.active").get_attribute("data-source") == "codes"
    answer.send_keys(END)
    assert page.one(".token.active").get_attribute("data-source") == "base"
    assert "end of text" in tip.text
    answer.send_keys(ENTER)
    eventually(lambda: len(page.all(".joint .position tbody tr")) == 3)


def test_focus_goes_from_the_prompt_to_run(demo: LiveServer, open_page: Open) -> None:
    page = open_page(demo.url)
    page.one("#prompt").click()
    order = []
    while "threshold" not in order and len(order) < 40:
        page.driver.switch_to.active_element.send_keys(TAB)
        order.append(page.js("return document.activeElement.id"))
    numbers, details, buttons = ["max-tokens", "temperature", "seed"], "", ["run", "share", "policy", "threshold"]
    assert order[-8:] == [*numbers, details, *buttons]
    assert order[:-8] == [""] * len(page.all("#examples button"))


def test_pointing_at_a_token_shows_the_gate(demo: LiveServer, open_page: Open) -> None:
    from selenium.webdriver import ActionChains

    page = open_page(demo.url)
    page.run()
    expert = page.one(f"[data-model='{MODEL}'] .token.expert-1")
    ActionChains(page.driver).move_to_element(expert).perform()
    tip = page.one(f"[data-model='{MODEL}'] .tip")
    assert tip.is_displayed()
    assert "gate " in tip.text
    assert "codes" in tip.text


@pytest.mark.parametrize("prompt", [PROMPT, 'it\'s "quoted" $HOME `date` \\n \\\n100% é 日本 😀'])
def test_copied_code_does_the_same(demo: LiveServer, open_page: Open, prompt: str) -> None:
    page = open_page(demo.url)
    page.js("arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
            page.one("#prompt"), prompt)  # fmt: skip
    page.run()
    shown = [token[:2] for token in page.tokens(MODEL)]
    page.allow_copying()
    copied = {}
    for language in ("curl", "python", "javascript"):
        page.one(f"#tab-{language}").click()
        page.one("#copy").click()
        eventually(lambda: page.one("#copy").text == "Copied")
        copied[language] = page.copied()
        eventually(lambda: page.one("#copy").text == "Copy")
    out = subprocess.run(["bash", "-c", copied["curl"]], capture_output=True, text=True, timeout=60, check=True).stdout
    events = [json.loads(line[6:]) for line in out.splitlines() if line.startswith("data: {")]
    reports = [choice["collaboration"] for event in events for choice in event["choices"]]
    assert [t for r in reports for t in zip(r["tokens"], r["sources"], strict=True)] == shown
    out = subprocess.run(
        [sys.executable, "-c", copied["python"]], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert out.splitlines() == [f"{source:>8}  {text!r}" for text, source in shown]


def authorized(page: Page) -> set[str | None]:
    """The Authorization headers of the requests to /v1 since the last look."""
    return {request["headers"].get("Authorization") for request in page.requests() if "/v1/" in request["url"]}


def test_a_key_opens_a_server_that_asks_for_one(keyed: str, open_page: Open) -> None:
    page = open_page(keyed)
    assert page.one("#status").text == "needs a key"
    assert "asks for an API key" in page.one("#notice").text
    assert page.js("return document.activeElement.id") == "key"
    assert page.all(".card") == []
    page.keys("#key", "wrong", TAB)
    eventually(lambda: page.one("#status").text == "wrong key")
    assert page.js("return sessionStorage.length") == 0
    page.one("#key").clear()
    page.requests()
    page.keys("#key", KEY, TAB)
    eventually(lambda: page.one("#status").text.startswith("ready"))
    assert not page.one("#notice").is_displayed()
    assert not page.one("#metrics").is_displayed()
    page.run()
    assert [card.get_attribute("data-finish") for card in page.all(".card")] == ["length"] * 4
    assert authorized(page) == {f"Bearer {KEY}"}


def test_a_key_is_kept_in_the_tab_alone(keyed: str, open_page: Open) -> None:
    page = open_page(keyed)
    page.keys("#key", KEY, TAB)
    eventually(lambda: page.one("#status").text.startswith("ready"))
    code = page.js("return document.querySelector('.code').textContent")
    assert "$COLLM_API_KEY" in code
    assert 'os.environ["COLLM_API_KEY"]' in code
    assert KEY not in page.js("return document.documentElement.outerHTML + location + document.cookie")
    assert page.js("return localStorage.length") == 0
    assert page.js("return Object.values(sessionStorage)") == [KEY]
    page.load(keyed)
    assert page.one("#status").text.startswith("ready")
    page.load(f"{keyed}/docs")
    eventually(lambda: len(page.all(".route")) > 5)
    page.driver.switch_to.new_window("tab")
    page.load(keyed)
    assert page.one("#status").text == "needs a key"
    assert page.one("#key").get_attribute("value") == ""


def test_two_experts_stand_side_by_side(keyed: str, open_page: Open) -> None:
    page = open_page(keyed)
    page.keys("#key", KEY, TAB)
    eventually(lambda: page.one("#status").text.startswith("ready"))
    titles = [title.text for title in page.all(".card h2")]
    assert titles == ["Together", "base alone", "codes alone", "arithmetic alone"]
    page.keys("#threshold", HOME)
    page.run()
    sources = [source for _, source, _ in page.tokens(STANDIN)]
    assert {"codes", "arithmetic"} <= set(sources) <= {"base", "codes", "arithmetic"}
    legend = page.one(".joint .legend").text
    for source in ("base", "codes", "arithmetic"):
        assert f"{sources.count(source)} {source}" in legend
    assert page.figure(STANDIN, "rate") == f"{100 * (1 - sources.count('base') / len(sources)):.0f} %"
    for name in ("base", "codes", "arithmetic"):
        assert {source for _, source, _ in page.tokens(f"{STANDIN}/{name}")} == {name}
    letters = page.js("return [...document.querySelectorAll('.joint .legend .letter')].map((e) => e.textContent)")
    assert letters == ["", "A", "B"]
    begins = page.js("return [...document.querySelectorAll('.joint .token[data-letter]')].map((t) =>"
                     " [t.dataset.source, t.dataset.letter])")  # fmt: skip
    assert {tuple(each) for each in begins} == {("codes", "A"), ("arithmetic", "B")}
    # The joint model in a row of its own, its members in the next.
    joint, *members = (card.rect for card in page.all(".card"))
    assert joint["width"] > 2 * members[0]["width"]
    assert len({member["y"] for member in members}) == 1


def test_chat_is_the_same_question(demo: LiveServer, open_page: Open) -> None:
    page = open_page(demo.url)
    page.all("#examples button")[0].click()
    page.wait()
    completed = page.tokens(MODEL)
    page.one("input[value='chat']").click()
    assert page.one("#prompt").get_attribute("value") == "Which currency codes does Iceland Krona have?"
    page.requests()
    page.run()
    bodies = page.posted()
    question = {"role": "user", "content": "Which currency codes does Iceland Krona have?"}
    assert [body["messages"] for body in bodies] == [[question]] * len(page.all(".card"))
    check_same(page.tokens(MODEL), completed)
    code = page.one("#code-python").get_attribute("textContent")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert out.splitlines() == [f"{source:>8}  {text!r}" for text, source, _ in completed]
    curl = page.one("#code-curl").get_attribute("textContent")
    out = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, timeout=60, check=True).stdout
    assert out.endswith("data: [DONE]\n\n")
    page.one("input[value='text']").click()
    assert page.one("#prompt").get_attribute("value").endswith("\nAnswer:")


def test_an_error_of_the_api_is_shown(demo: LiveServer, open_page: Open) -> None:
    page = open_page(demo.url)
    page.set_number("#max-tokens", 5000)
    page.run()
    assert "5000 by 'max_tokens'" in page.one("#notice").text
    assert "context_length_exceeded" in page.one("#notice").text
    assert not any(error.is_displayed() for error in page.all(".error"))  # once is enough
    assert all("error 400" in card.text for card in page.all(".card"))
    page.set_number("#max-tokens", 8)
    page.run()
    assert len(page.tokens(MODEL)) == 8
    assert not page.one("#notice").is_displayed()


def test_tokens_come_one_by_one_and_can_be_stopped(slow: str, open_page: Open) -> None:
    page = open_page(slow)
    page.js(
        "window.grown = 0; new MutationObserver(() => window.grown++)"
        ".observe(document.querySelector('.joint .text'), {childList: true, subtree: true})"
    )
    page.set_number("#max-tokens", 400)
    page.one("#run").click()
    eventually(lambda: page.js("return window.grown") > 10)
    assert page.one("#stop").is_enabled()
    page.keys("body", ESCAPE)
    page.wait()
    assert 10 < len(page.tokens(STANDIN)) < 400
    assert page.one(".joint").get_attribute("data-finish") == "stopped"
    # The server was told too: nothing goes on being written.
    eventually(lambda: f'collm_requests_running{{model_name="{STANDIN}"}} 0.0' in httpx.get(f"{slow}/metrics").text)
    seen = len(page.tokens(STANDIN))
    time.sleep(0.3)
    assert len(page.tokens(STANDIN)) == seen


def test_a_pair_without_a_gate_offers_what_needs_none(open_page: Open) -> None:
    with scripted(writes([70, 71]), gate=False) as address:
        page = open_page(address)
        disabled = {option.get_attribute("value") for option in page.all("#policy option:disabled")}
        assert disabled == {"threshold", "sample"}
        assert page.one("#policy").get_attribute("value") == "confidence"
        page.requests()
        page.run()
        bodies = page.posted()
        assert bodies[0]["collaboration"] == {"report": True}  # the server's default
        assert len(page.tokens(MODEL)) == 2


def test_what_a_model_writes_is_text(open_page: Open) -> None:
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>&amp;\n<b>bold</b>"
    with scripted(writes(byte_level_tokenizer().encode(evil).ids)) as address:
        page = open_page(address)
        page.set_number("#max-tokens", 150)
        page.run()
        assert "".join(text for text, _, _ in page.tokens(MODEL)) == evil
        assert page.all(".card img, .card script, .card b b") == []
        assert page.console() == []


def test_an_error_in_the_stream_is_shown_with_what_came_before(open_page: Open) -> None:
    def script(request: GenerationRequest) -> list[Delta]:
        failed = Delta(request.request_id, [], [], [])
        failed.finish_reason, failed.error = "error", "The lane fell over."
        return [*deltas_of(request, [70, 71])[:1], failed]

    with scripted(script) as address:
        page = open_page(address)
        page.run()
        assert "The lane fell over." in page.one("#notice").text
        assert len(page.tokens(MODEL)) == 1


def test_a_server_that_is_gone_is_told(open_page: Open) -> None:
    with scripted(writes([70])) as address:
        page = open_page(address)
    page.run()
    eventually(lambda: "cannot be reached" in page.one("#notice").text)
    eventually(lambda: page.one("#status").text == "not connected")


def test_a_server_that_ended_is_noticed_without_a_run(open_page: Open) -> None:
    with scripted(writes([70])) as address:
        page = open_page(address)
        assert page.one("#status").text == "ready"
    eventually(lambda: page.one("#status").text == "not connected")


@pytest.mark.parametrize("width", [320, 390])
def test_phones_scroll_in_one_direction(demo: LiveServer, open_page: Open, width: int) -> None:
    page = open_page(demo.url, width, 800)
    assert page.too_wide() <= 0
    page.run()
    assert page.too_wide() <= 0
    tops = [card.rect["y"] for card in page.all(".card")]
    assert tops == sorted(set(tops))
    page.load(f"{demo.url}/docs")
    eventually(lambda: len(page.all(".route")) > 5)
    assert page.too_wide() <= 0


LUMINANCE = """
const channel = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const behind = (e) => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
  if (c.length < 4 || c[3] === 1) return c; } return [255, 255, 255]; };
return arguments[0].flatMap((selector) => [...document.querySelectorAll(selector)])
  .filter((e) => e.checkVisibility() && e.textContent.trim())
  .map((e) => { const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    return [e.className + ' ' + e.textContent.slice(0, 20), (a + 0.05) / (b + 0.05)]; });
"""


@pytest.mark.parametrize("dark", [False, True])
def test_dark_and_light_are_readable(demo: LiveServer, open_page: Open, dark: bool) -> None:
    page = open_page(demo.url, dark=dark)
    page.run()
    red = int(page.js("return getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]"))
    assert (red < 60) is dark
    selectors = [".hint", ".label", ".token", ".card-state", ".card code", ".figures dt", "#run", ".chip", ".code pre"]
    contrasts = page.js(LUMINANCE, selectors)
    assert len(contrasts) > 50
    assert [(name, ratio) for name, ratio in contrasts if ratio < 4.5] == []


def test_every_example_is_a_held_out_question() -> None:
    root = Path(__file__).parents[3]
    source = (root / "server/playground/static/examples.js").read_text()
    [block] = re.findall(r"const DEMO = \[(.*?)\];", source, re.S)
    shown = json.loads(f"[{block.strip().rstrip(',')}]")
    questions = json.loads((root / "models/demo/questions.json").read_text())
    assert set(shown) <= {question["prompt"] for question in questions if question["split"] == "test"}
