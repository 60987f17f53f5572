"""A real Chromium without a window, and servers for it to look at."""

from __future__ import annotations

import asyncio
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from server.app import create_app
from server.service import Service
from server.text.tokenizer import TextTokenizer
from tests.server.commands.servers import standins
from tests.server.fakes import FakeEngine, Script, byte_level_tokenizer, settings
from tests.server.playground.page import Page

try:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service as Driver
except ImportError:
    webdriver = None  # type: ignore[assignment]

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

Open = Callable[..., Page]


@pytest.fixture(scope="package")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Stand-in lanes that take their time, with three experts."""
    with standins(tmp_path_factory.mktemp("slow"), step_seconds=0.04, experts=("law", "codes", "art")) as address:
        yield address


KEY = "sk-very-secret"


@pytest.fixture(scope="package")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Stand-in lanes with two experts behind an API key, with pages that open without it."""
    folder = tmp_path_factory.mktemp("keyed")
    with standins(folder, experts=("codes", "arithmetic"), keys=[KEY]) as address:
        yield address


@pytest.fixture
def open_page(tmp_path: Path) -> Iterator[Open]:
    """Opens pages: ``open_page(address, width=390, dark=True)``. Every one has a browser with an empty profile."""
    opened: list[Page] = []

    def make(address: str, width: int = 1280, height: int = 1000, *, dark: bool = False) -> Page:
        if webdriver is None:
            pytest.skip("no selenium: pip install selenium")
        try:
            driver = chromium(tmp_path / f"profile-{len(opened)}")
        except FileNotFoundError as missing:
            pytest.skip(str(missing))
        page = Page(driver, address)
        opened.append(page)
        page.resize(width, height)
        page.prefer(dark=dark)
        page.load(address)
        return page

    yield make
    for page in opened:
        page.driver.quit()


def chromium(profile: Path) -> Any:
    """A Chromium without a window, its profile in a folder of its own.

    Raises:
        FileNotFoundError: there is none.
    """
    browser = next(filter(None, map(shutil.which, CHROMIUM)), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        raise FileNotFoundError("no chromium or no chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Driver(driver))


@contextmanager
def scripted(script: Script, **engine: Any) -> Iterator[str]:
    """The real application around an engine that writes what it is told; gives its address."""
    service = Service(settings(), TextTokenizer(byte_level_tokenizer()))
    service.attach(FakeEngine(script, **engine))
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        config = uvicorn.Config(create_app(service), log_config=None, lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])))
        thread.start()
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
            service.tokenizer.close()
