"""Makes the documentation's pictures of the playground from a running demo server.

python -m tests.server.playground.pictures http://localhost:8000 docs/images
"""

from __future__ import annotations

import argparse
import base64
import io
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from tests.server.playground.conftest import chromium
from tests.server.playground.page import Page

WIDTH, HEIGHT = 1200, 900
SHOWN = 900  # pixels of the film's width
FRAME_MS = 120

COMPACT = """
for (const each of document.querySelectorAll(
  ".examples, .numbers, .more, #auto, #models, #experts, #blend-field, #sweep, #policy-hint")) {
  (each.closest("label") ?? each).hidden = true;
}
document.getElementById("key").closest(".field").hidden = true;
document.getElementById("prompt").rows = 2;
const sheet = new CSSStyleSheet();
sheet.replaceSync("[data-figure=speed], [data-figure=first] { display: none } ::-webkit-scrollbar { display: none }");
document.adoptedStyleSheets = [sheet];
"""
"""Leaves of the page what the film is about; of the figures what slow motion does not change."""

SLOW_MOTION = """
const real = fetch;
window.fetch = async (...given) => {
  const answer = await real(...given);
  if (!answer.headers.get("content-type")?.startsWith("text/event-stream")) return answer;
  const events = (await answer.text()).split("\\n\\n");
  const pull = async (to) => {
    if (!events.length) return to.close();
    await new Promise((done) => setTimeout(done, 150));
    to.enqueue(new TextEncoder().encode(`${events.shift()}\\n\\n`));
  };
  return new Response(new ReadableStream({ pull }), { headers: answer.headers });
};
"""
"""Events at a pace that one can read: the demo's models are faster than a film can show."""
PROMPT = "Question: Which currency codes does Iceland Krona have?\nAnswer:"


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the documentation's pictures of the playground.")
    parser.add_argument("url", help="address of a server of the demo pair")
    parser.add_argument("out", type=Path, help="folder")
    arguments = parser.parse_args()
    for dark, name in ((False, "playground.png"), (True, "playground-dark.png")):
        with browser(arguments.url, dark=dark) as page:
            page.ask(PROMPT)
            page.run()
            page.resize(WIDTH, top_of(page, "#history"))
            page.js("scrollTo(0, 0)")
            page.save(arguments.out / name)
    with browser(arguments.url, dark=False) as page:
        frames = list(motion(page))
    first, *others = (frame for frame, _ in frames)
    first.save(
        arguments.out / "playground.webp",
        save_all=True,
        append_images=others,
        duration=[milliseconds for _, milliseconds in frames],
        loop=0,
        quality=60,
        method=6,
    )


def motion(page: Page) -> Iterator[tuple[Image.Image, int]]:
    """Frames and how long each stands: the answer as it comes, another threshold, and the members at a token."""
    page.ask(PROMPT)
    for box in page.all("#models input")[2:]:
        box.click()  # the joint model and the base
    page.js(COMPACT)
    page.run()  # once before, so that no step of the recorded run is the first of its kind
    page.resize(WIDTH, top_of(page, "#history"))
    page.js("document.getElementById('history').remove(); scrollTo(0, 0)")
    yield shot(page), 600
    page.js(SLOW_MOTION)
    page.js("document.getElementById('run').click()")
    while page.one("#stop").is_enabled():
        yield shot(page), FRAME_MS
    yield shot(page), 2000
    for at in (60, 40, 20, 0):
        page.js(
            "const t = arguments[0]; t.value = arguments[1]; t.dispatchEvent(new Event('input', {bubbles: true}))",
            page.one("#threshold"),
            at,
        )
        yield shot(page), 400
    yield shot(page), 1500
    page.one("#threshold-reset").click()
    page.js("document.querySelector('.joint .token.expert-1').click()")
    time.sleep(1)
    yield shot(page), 3000


def shot(page: Page) -> Image.Image:
    """What the window shows."""
    data = page.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"]
    image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
    return image.resize((SHOWN, image.height * SHOWN // image.width), Image.Resampling.LANCZOS)


def top_of(page: Page, selector: str) -> int:
    """Where an element begins, in pixels from the top of the page."""
    return int(page.js("return document.querySelector(arguments[0]).getBoundingClientRect().top + scrollY", selector))


@contextmanager
def browser(url: str, *, dark: bool) -> Iterator[Page]:
    """The playground in a window."""
    with tempfile.TemporaryDirectory() as profile:
        page = Page(chromium(Path(profile)), url)
        try:
            page.resize(WIDTH, HEIGHT)
            page.prefer(dark=dark)
            page.load(url)
            yield page
        finally:
            page.driver.quit()


if __name__ == "__main__":
    main()
