"""The playground as a user handles it."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.waiting import eventually

# Keys, as WebDriver writes them.
CTRL, ENTER, ESCAPE, HOME, END = "\ue009", "\ue007", "\ue00c", "\ue011", "\ue010"
RIGHT, DOWN, TAB = "\ue014", "\ue015", "\ue004"

FINISHED = ("stop", "length", "stopped", "error")


@dataclass
class Page:
    """A browser that shows a page of a server."""

    driver: Any
    address: str

    def resize(self, width: int, height: int) -> None:
        """The size of the window, as a phone's where it is narrow."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def prefer(self, *, dark: bool) -> None:
        """What the user's system prefers."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def load(self, address: str) -> None:
        """Open a page; the playground is waited for until it has asked the server."""
        self.driver.get(address)
        if self.driver.title != "Co-LLM API reference":
            eventually(lambda: self.one("#status").get_attribute("data-kind") in ("ready", "failed"))

    def js(self, script: str, *arguments: Any) -> Any:
        """Run a script in the page; gives what it returns."""
        return self.driver.execute_script(script, *arguments)

    def one(self, selector: str) -> Any:
        """The element."""
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        """The elements."""
        return list(self.driver.find_elements("css selector", selector))

    def keys(self, selector: str, *keys: str) -> None:
        """Type."""
        self.one(selector).send_keys(*keys)

    def ask(self, prompt: str) -> None:
        """Write a prompt in the place of the one that is there."""
        self.one("#prompt").clear()
        # As from an input method: keys have no characters beyond the first 65,536, which emoji are.
        self.one("#prompt").click()
        self.driver.execute_cdp_cmd("Input.insertText", {"text": prompt})

    def set_number(self, selector: str, value: int) -> None:
        """Write a number into a field."""
        self.one(selector).clear()
        self.keys(selector, str(value))

    def run(self) -> None:
        """Press Run, and wait until every shown answer has ended."""
        self.one("#run").click()
        self.wait()

    def wait(self) -> None:
        """Until every shown answer has ended."""
        eventually(
            lambda: (
                all(card.get_attribute("data-finish") in FINISHED for card in self.all(".card:not([hidden])"))
                and not self.one("#stop").is_enabled()
            )
        )

    def tokens(self, model: str) -> list[tuple[str, str, float | None]]:
        """What a card shows: text, source and the gate's probability of each token."""
        found = self.js(
            "return [...document.querySelectorAll(`[data-model='${arguments[0]}'] .token`)].map(t =>"
            " [t.token.text, t.dataset.source, t.dataset.p === undefined ? null : Number(t.dataset.p)])",
            model,
        )
        return [(text, source, p) for text, source, p in found]

    def slide(self, threshold: float) -> None:
        """Move the threshold's slider to the position nearest to a threshold, as the pointer does."""
        inside = 0 < threshold < 1
        position = round(100 * (1 + math.log(threshold / (1 - threshold)) / 7)) if inside else 200 * threshold
        self.js(
            "const t = arguments[0]; t.value = arguments[1]; t.dispatchEvent(new Event('input', {bubbles: true}))",
            self.one("#threshold"),
            position,
        )

    def posted(self) -> list[dict[str, Any]]:
        """The bodies of the requests that were posted since the last look."""
        return [json.loads(request["postData"]) for request in self.requests() if request["method"] == "POST"]

    def figure(self, model: str, name: str) -> str:
        """One of a card's figures."""
        return str(self.one(f"[data-model='{model}'] [data-figure='{name}'] b").text)

    def allow_copying(self) -> None:
        """As a user allows it when the browser asks."""
        permissions = {"origin": self.address, "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
        self.driver.execute_cdp_cmd("Browser.grantPermissions", permissions)

    def copied(self) -> str:
        """What the clipboard holds."""
        return str(self.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])"))

    def console(self) -> list[str]:
        """What the browser complained of since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[dict[str, Any]]:
        """Every request since the last call, as the browser's network layer saw it; its own new tab is left out."""
        messages = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        sent = [m["params"]["request"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [request for request in sent if not request["url"].startswith(("chrome:", "chrome-untrusted:", "data:"))]

    def too_wide(self) -> int:
        """By how many pixels the page is wider than the window."""
        return int(self.js("return document.documentElement.scrollWidth - innerWidth"))

    def save(self, file: Path) -> None:
        """Save what the window shows as a PNG."""
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
        file.write_bytes(base64.b64decode(shot["data"]))
