"""Runs of the page: links, history, conversations, many models, long answers, accessibility."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.live import LiveServer
from tests.server.commands.servers import MODEL as STANDIN
from tests.server.commands.servers import standins
from tests.server.fakes import byte_level_tokenizer, writes
from tests.server.playground.conftest import KEY, Open, scripted
from tests.server.playground.page import END, TAB
from tests.waiting import eventually

pytestmark = pytest.mark.browser

MODEL = "collm-demo"
PROMPT = "Question: Which currency codes does Iceland Krona have?\nAnswer:"


def test_a_link_carries_prompt_and_settings_and_no_key(keyed: str, open_page: Open) -> None:
    page = open_page(keyed)
    page.keys("#key", KEY, TAB)
    eventually(lambda: page.one("#status").text.startswith("ready"))
    page.js("document.querySelector('.more').open = true")
    page.ask("Grüße, 日本 😀")
    page.one("#policy option[value='confidence']").click()
    page.slide(0.25)
    page.set_number("#top-p", 1)
    page.keys("#stops", "END")
    page.one("#experts input[value='arithmetic']").click()
    chosen = page.js("return document.getElementById('threshold-value').textContent")
    page.one("#share").click()
    link = page.js("return location.href")
    assert KEY not in link
    page.driver.get("about:blank")
    page.load(link)
    eventually(lambda: page.one("#status").text.startswith("ready"))
    assert page.one("#prompt").get_attribute("value") == "Grüße, 日本 😀"
    assert page.one("#threshold-value").text == chosen
    page.requests()
    page.run()
    [joint] = [body for body in page.posted() if body["model"] == STANDIN]
    assert joint["collaboration"] == {
        "policy": "confidence", "threshold": float(chosen), "experts": ["codes"], "report": True,
    }  # fmt: skip
    assert joint["stop"] == ["END"]
    assert joint["top_p"] == 1


@pytest.mark.parametrize("fragment", ["run=%%%", "run=AAAA", "run=bnVsbA", "run=WzFd", "else"])
def test_a_broken_link_is_no_obstacle(slow: str, open_page: Open, fragment: str) -> None:
    page = open_page(f"{slow}/#{fragment}")
    assert page.one("#status").text == "ready"
    assert page.one("#prompt").get_attribute("value")
    assert page.console() == []


def test_runs_are_kept_and_shown_again(demo: LiveServer, open_page: Open) -> None:
    page = open_page(demo.url)
    page.ask(PROMPT)
    page.run()
    first = page.tokens(MODEL)
    page.keys("#threshold", END)
    page.ask("Question: Which language codes does Korean have?\nAnswer:")
    page.run()
    assert page.tokens(MODEL) != first
    assert len(page.all("#history button")) == 2
    page.requests()
    page.all("#history button")[1].click()
    assert page.tokens(MODEL) == first
    assert page.one("#prompt").get_attribute("value") == PROMPT
    assert page.one("#threshold-value").text.endswith("the gate's")
    assert page.posted() == []


def test_a_reload_keeps_what_was_typed(slow: str, open_page: Open) -> None:
    page = open_page(slow)
    page.ask("Mine, é")
    page.set_number("#max-tokens", 7)
    page.one("#policy option[value='always']").click()
    page.load(f"{slow}/docs")
    page.load(slow)
    page.one("#policy option[value='never']").click()
    page.driver.refresh()
    eventually(lambda: page.one("#status").get_attribute("data-kind") == "ready")
    page.run()
    joint = page.posted()[0]
    assert (joint["prompt"], joint["max_tokens"]) == ("Mine, é", 7)
    assert joint["collaboration"]["policy"] == "never"
    stored = str(page.js("return JSON.stringify(sessionStorage)"))
    assert "Mine, é" in stored


def test_a_link_is_more_than_what_was_typed_and_less_than_what_was_done_with_it(slow: str, open_page: Open) -> None:
    page = open_page(slow)
    page.ask("from the link")
    page.one("#share").click()
    link = page.js("return location.href")
    page.ask("typed later")
    page.driver.refresh()
    eventually(lambda: page.one("#status").get_attribute("data-kind") == "ready")
    assert page.one("#prompt").get_property("value") == "typed later"
    page.load(f"{slow}/docs")
    page.load(link)
    assert page.one("#prompt").get_property("value") == "from the link"


def test_what_the_page_shows_is_in_force_with_a_blend_too(tmp_path: Path, open_page: Open) -> None:
    half = '[blends.half]\nkind = "mixture"\npolicy = "always"\nserved_model_name = "served-half"\n'
    with standins(tmp_path, more=half) as address:
        page = open_page(address)
        page.one("#blend option[value='half']").click()
        page.set_number("#max-tokens", 30)
        page.run()
        assert page.posted()[0]["collaboration"]["policy"] == "threshold"
        sources = {source for _, source, _ in page.tokens(STANDIN)}
        assert sources == {"base", "blend"}
        assert "threshold 0.50, half: " in page.one("#history .run").text
        # The blend's own model is no member.
        titles = [label.text for label in page.all("#models label")]
        assert titles == ["Together", "base alone", "codes alone", "served-half"]
        assert len(page.all(".joint .legend .swatch")) == len(["base", "blend", "codes"])
        assert {source for _, source, _ in page.tokens("served-half")} == {"blend"}


def test_a_conversation_goes_on(demo: LiveServer, open_page: Open) -> None:
    page = open_page(demo.url)
    page.one("input[value='chat']").click()
    page.js("document.querySelector('.more').open = true")
    page.keys("#system", "You are brief.")
    page.ask("Which currency codes does Iceland Krona have?")
    page.run()
    answer = "".join(text for text, _, _ in page.tokens(MODEL))
    page.one(f"[data-model='{MODEL}'] header button").click()  # Reply
    assert page.one("#prompt").get_attribute("value") == ""
    turns = page.js("return [...document.querySelectorAll('.turn span')].map((each) => each.textContent)")
    assert turns == ["Which currency codes does Iceland Krona have?", answer]
    page.ask("And Korean?")
    page.requests()
    page.run()
    [joint] = [body for body in page.posted() if body["model"] == MODEL]
    assert joint["messages"] == [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "Which currency codes does Iceland Krona have?"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "And Korean?"},
    ]
    page.one("#turns button").click()
    assert not page.one("#turns").is_displayed()


def test_many_models_start_with_four_and_are_never_queued_by_the_browser(tmp_path: Path, open_page: Open) -> None:
    with standins(tmp_path, experts=("a", "b", "c", "d", "e", "f"), step_seconds=0.03) as address:
        page = open_page(address)
        assert [box.is_selected() for box in page.all("#models input")] == [True] * 4 + [False] * 4
        for box in page.all("#models input")[4:]:
            box.click()
        page.set_number("#max-tokens", 5)
        page.js(
            "const real = fetch; window.open = 0; window.most = 0; window.fetch = async (...given) => {"
            "  window.most = Math.max(window.most, ++window.open);"
            "  try { return await real(...given); } finally { window.open--; } };"
        )
        page.run()
        assert [card.get_attribute("data-finish") for card in page.all(".card")] == ["length"] * 8
        assert page.js("return window.most") <= 4


def test_eight_thousand_tokens(open_page: Open) -> None:
    """Scripts, styles and layout take under 2 s of the main thread, a step of the slider a frame."""
    ids = byte_level_tokenizer().encode("words and numbers 0123456789\n" * 400).ids[:8000]
    with scripted(writes(ids), max_model_len=20000) as address:
        page = open_page(address)
        for box in page.all("#models input")[1:]:
            box.click()
        page.set_number("#max-tokens", len(ids))
        # Of the thread's own time: others may keep the processor busy.
        page.driver.execute_cdp_cmd("Performance.setTimeDomain", {"timeDomain": "threadTicks"})
        page.driver.execute_cdp_cmd("Performance.enable", {})

        def spent() -> dict[str, float]:
            metrics = page.driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
            return {metric["name"]: metric["value"] for metric in metrics if metric["name"].endswith("Duration")}

        before = spent()
        page.run()
        took = {name: value - before[name] for name, value in spent().items()}
        assert len(page.tokens(MODEL)) == len(ids)
        step = page.js(
            "const t = document.getElementById('threshold'); const begin = performance.now();"
            "for (let at = 60; at < 90; at++) { t.value = at; t.dispatchEvent(new Event('input', {bubbles: true}));"
            " document.body.getBoundingClientRect(); } return (performance.now() - begin) / 30"
        )
        print(f"main thread for {len(ids)} tokens: {took}; {step:.1f} ms for a step of the slider")
        assert took["ScriptDuration"] + took["LayoutDuration"] + took["RecalcStyleDuration"] < 2
        assert step < 16


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("path", ["", "docs"])
def test_axe_finds_nothing(demo: LiveServer, open_page: Open, width: int, path: str) -> None:
    import axe_core_python

    page = open_page(f"{demo.url}/{path}", width)
    if path:
        eventually(lambda: len(page.all(".route")) > 5)
    else:
        page.run()
        page.all(".joint .token")[3].click()
        eventually(lambda: len(page.all(".joint .position tbody tr")) == 3)
    page.js("for (const each of document.querySelectorAll('details')) each.open = true")
    page.driver.execute_cdp_cmd("Page.setBypassCSP", {"enabled": True})
    page.js((Path(axe_core_python.__file__).parent / "axe.min.js").read_text())
    found = page.driver.execute_async_script("axe.run().then((result) => arguments[0](result.violations))")
    assert [(each["id"], each["impact"], each["nodes"][0]["html"]) for each in found] == []
