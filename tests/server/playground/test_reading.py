"""Reading an answer on the page: writers, trace, what members and other thresholds would have made of it."""

from __future__ import annotations

import httpx
import pytest

from server.shares import threshold_of
from tests.live import LiveServer
from tests.server.fakes import byte_level_tokenizer, writes
from tests.server.playground.conftest import Open, scripted
from tests.server.playground.page import END, HOME
from tests.waiting import eventually

pytestmark = pytest.mark.browser

MODEL = "collm-demo"
PROMPT = "Question: Which currency codes does Iceland Krona have?\nAnswer:"


def test_experts_are_told_apart_without_colour(slow: str, open_page: Open) -> None:
    page = open_page(slow)
    page.set_number("#max-tokens", 60)
    page.keys("#threshold", HOME)
    page.run()
    styles: dict[str, set[str]] = {}
    found = page.js(
        "return [...document.querySelectorAll('.joint .token:not(.blank)')].map(t =>"
        " [t.dataset.source, getComputedStyle(t).textDecorationStyle, getComputedStyle(t).textDecorationLine])"
    )
    for source, style, line in found:
        styles.setdefault(source, set()).add(style if line == "underline" else "no line")
    assert set(styles) >= {"law", "codes", "art"}
    assert all(len(each) == 1 for each in styles.values())
    assert len({style for each in styles.values() for style in each}) == len(styles)


def test_the_line_is_where_a_bar_of_that_probability_ends(slow: str, open_page: Open) -> None:
    """Also where there are so many bars that they scroll; and the arrow keys scroll to the bar of their token."""
    page = open_page(slow, 390, 800)
    page.set_number("#max-tokens", 120)
    page.run()
    assert page.js("const s = document.querySelector('.joint .strip'); return s.scrollWidth > s.clientWidth")
    for at in (0.25, 0.75):
        page.slide(at)
        shown = float(page.one("#threshold-value").text)
        strip = page.one(".joint .strip").rect
        line = page.one(".joint .threshold-line").rect
        assert line["y"] == pytest.approx(strip["y"] + (1 - shown) * 72, abs=1.5)
    answer = page.one(".joint .text")
    page.js("arguments[0].focus()", answer)
    answer.send_keys(END)
    eventually(lambda: page.js("const s = document.querySelector('.joint .strip');"
                               "return s.scrollLeft + s.clientWidth >= s.scrollWidth - 1"))  # fmt: skip


TOPS = """
const canvas = document.querySelector('.joint canvas'), strip = document.querySelector('.joint .strip');
const width = Math.min(Math.max(strip.clientWidth / arguments[0], 4), 22);
const pixels = canvas.getContext('2d');
return [...Array(arguments[0]).keys()].map((number) => {
  const column = pixels.getImageData(Math.floor((number + 0.4) * width), 0, 1, canvas.height).data;
  for (let y = 0; y < canvas.height; y++) if (column[4 * y + 3] > 60) return 1 - y / canvas.height;
  return 0;
});
"""


def test_bars_are_as_high_as_the_probabilities(demo: LiveServer, open_page: Open) -> None:
    page = open_page(demo.url)
    page.ask(PROMPT)
    page.run()
    values = [p for _, _, p in page.tokens(MODEL)]
    page.js("return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    for top, p in zip(page.js(TOPS, len(values)), values, strict=True):
        assert top == pytest.approx(p, abs=0.05)


def test_members_are_asked_at_a_token(demo: LiveServer, open_page: Open) -> None:
    page = open_page(demo.url)
    page.ask(PROMPT)
    page.run()
    number = [source for _, source, _ in page.tokens(MODEL)].index("codes")
    page.all(".joint .token")[number].click()
    eventually(lambda: len(page.all(".joint .position tbody tr")) == 3)
    rows = {row.find_element("css selector", "th").text: row for row in page.all(".joint .position tbody tr")}
    assert set(rows) == {"base", "codes", "arithmetic"}
    text = page.tokens(MODEL)[number][0]
    first = rows["codes"].find_element("css selector", "td")
    assert first.text.startswith(f"“{text.replace(' ', '␣')}”")
    assert "written" in first.get_attribute("class")
    assert not rows["base"].find_element("css selector", "td").text.startswith(f"“{text.replace(' ', '␣')}”")


def test_members_are_asked_in_a_chat_too(demo: LiveServer, open_page: Open) -> None:
    page = open_page(demo.url)
    page.one("input[value='chat']").click()
    page.run()
    page.all(".joint .token")[0].click()
    eventually(lambda: len(page.all(".joint .position tbody tr")) == 3)
    assert page.tokens(MODEL)[0][0].strip() in page.one(".joint .position td").text


def test_moving_the_threshold_marks_what_would_change(demo: LiveServer, open_page: Open) -> None:
    page = open_page(demo.url)
    page.ask(PROMPT)
    page.run()
    assert page.all(".flips") == []
    page.keys("#threshold", END)  # nobody above 1: the expert's tokens would be the base's
    sources = [source for _, source, _ in page.tokens(MODEL)]
    marked = page.js("return [...document.querySelectorAll('.joint .flips')].map((t) => t.number)")
    assert marked == [number for number, source in enumerate(sources) if source == "codes"]
    assert f"{len(marked)} would change writers" in page.one(".joint .trace-caption").text
    page.keys("#threshold", HOME)
    marked = page.js("return [...document.querySelectorAll('.joint .flips')].map((t) => t.number)")
    assert marked == [number for number, source in enumerate(sources) if source == "base"]
    page.one("#threshold-reset").click()
    assert page.all(".flips") == []
    page.one("#policy option[value='confidence']").click()
    page.keys("#threshold", END)  # the answer's values are the gate's: nothing can be said
    assert page.all(".flips") == []


def test_a_blend_is_painted_by_the_experts_share(demo: LiveServer, open_page: Open) -> None:
    page = open_page(demo.url)
    page.one("#blend option[value='mixture']").click()
    page.ask(PROMPT)
    page.run()
    [joint] = [body for body in page.posted() if body["model"] == MODEL]
    assert joint["collaboration"] == {"policy": "threshold", "blend": "mixture", "report": True}
    sources = [source for _, source, _ in page.tokens(MODEL)]
    assert set(sources) == {"base", "blend"}
    assert f"{sources.count('blend')} blend" in page.one(".joint .legend").text
    shares = page.js("return [...document.querySelectorAll('.joint .token.blend')].map((t) =>"
                     " Number(t.style.getPropertyValue('--experts')))")  # fmt: skip
    assert all(0 <= share <= 1 for share in shares)
    assert max(shares) > 0.5


def test_five_thresholds_in_one_click(demo: LiveServer, open_page: Open) -> None:
    page = open_page(demo.url)
    page.ask(PROMPT)
    page.run()
    page.requests()
    page.one("#sweep").click()
    eventually(lambda: page.one("#announce").get_attribute("textContent") == "Five thresholds are answered.")
    rows = [
        [cell.text for cell in row.find_elements("css selector", "td")] for row in page.all("#sweep-result tbody tr")
    ]
    asked = [body["collaboration"]["threshold"] for body in page.posted()]
    assert len(rows) == len(asked) >= 3
    assert asked == sorted(asked, reverse=True)
    assert rows[0][1] == "0 %"
    assert rows[-1][1] == "100 %"
    base = "".join(text for text, _, _ in page.tokens(f"{MODEL}/base"))
    assert rows[0][2].strip() == base.strip()
    page.all("#sweep-result button")[0].click()
    page.wait()
    assert page.figure(MODEL, "rate") == "0 %"


def test_an_answer_is_copied_without_marks(open_page: Open) -> None:
    """Neither an end mark nor one inside a character of several tokens; and the text reads as prose."""
    text = "Ünïcode 日本 😀\nnext line"
    with scripted(writes(byte_level_tokenizer().encode(text).ids)) as address:
        page = open_page(address)
        page.set_number("#max-tokens", 100)
        page.run()
        page.allow_copying()
        page.one(".joint .card-actions button:last-child").click()
        eventually(lambda: page.one(".joint .card-actions button:last-child").text == "Copied")
        assert page.copied() == text
        assert page.js("return document.querySelector('.joint .text').innerText").strip() == text
        assert page.all(".token.end") == []
        assert page.all(".joint [role='option']") == []


def test_unsure_tokens_are_marked(demo: LiveServer, open_page: Open) -> None:
    page = open_page(demo.url)
    page.ask(PROMPT)
    page.run()
    body: dict[str, object] = {"model": f"{MODEL}/base", "prompt": PROMPT, "max_tokens": 64, "temperature": 0}
    body["collaboration"] = {"report": True}
    report = httpx.post(f"{demo.url}/v1/completions", json=body).json()["choices"][0]["collaboration"]
    marked = page.js("return [...document.querySelectorAll(`[data-model='${arguments[0]}'] .token`)].map((t) =>"
                     " t.classList.contains('unsure'))", f"{MODEL}/base")  # fmt: skip
    assert marked == report["check"] == [sure < 0.7 for sure in report["base_confidences"]]
    assert any(marked)


def test_a_threshold_by_the_share_of_tokens(demo: LiveServer, open_page: Open) -> None:
    """The field shows the share of the threshold in force; a share of one's own is sent as it is."""
    page = open_page(demo.url)
    page.ask(PROMPT)
    share = page.one("#share-of-tokens")
    assert share.is_displayed()
    assert share.get_attribute("value") == "22"  # what the demo's gate was calibrated for
    page.set_number("#share-of-tokens", 45)
    assert page.one("#threshold-reset").is_displayed()
    page.run()
    joint = [body for body in page.posted() if body["model"] == MODEL]
    assert [body["collaboration"] for body in joint] == [{"share": 0.45, "report": True}]
    assert page.js("return document.querySelector('.joint').dataset.finish") == "stop"
    page.keys("#threshold", END)
    assert share.get_attribute("value") == "0"
    page.run()
    [body] = [body for body in page.posted() if body["model"] == MODEL]
    assert body["collaboration"] == {"threshold": 1, "report": True}
    page.one("#threshold-reset").click()
    assert share.get_attribute("value") == "22"


def test_the_page_reckons_shares_as_the_server_does(slow: str, open_page: Open) -> None:
    page = open_page(slow)
    shares = [0.0, 0.004, 0.05, 0.1, 0.15, 0.2, 0.31, 0.7, 0.999, 1.0]
    for curve in (
        [(1.0, 0.0), (0.97, 0.0), (0.95, 0.1), (0.9, 0.09), (0.5, 0.2), (0.1, 0.4), (0.02, 1.0), (0.0, 1.0)],
        [(1.0, 0.0), (0.0, 1.0)],
        [(1.0, 0.0), (0.7, 0.1), (0.0, 1.0)],
    ):
        thresholds, back = page.js(
            "const [curve, shares] = arguments;"
            "return import('/static/odds.js').then((odds) => {"
            "  const thresholds = shares.map((share) => odds.thresholdFor(share, curve));"
            "  return [thresholds, thresholds.map((threshold) => odds.shareAt(threshold, curve))];"
            "});",
            [{"threshold": threshold, "share": share} for threshold, share in curve],
            shares,
        )
        assert thresholds == pytest.approx([threshold_of(share, curve) for share in shares], rel=1e-6)
        assert back == pytest.approx(shares, rel=1e-6)
