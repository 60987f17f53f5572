"""``collm`` as a newcomer uses it: ``collm serve`` on the demo pair, then the other commands."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import COMMAND, Terminal, environment, piped
from tests.packaging.sources import ROOT
from tests.waiting import eventually

QUESTION = "Which currency codes does Iceland Krona have?"
ANSWER = "The currency code of Iceland Krona is ISK and the numeric currency code is 352."


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("demo") / "log"
    arguments = ["serve", "--config", "deploy/config/demo.toml", "--port", "0"]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*COMMAND, *arguments], cwd=ROOT, env={**environment(None), "OMP_NUM_THREADS": "1"}, stdout=out, stderr=out
        )
    address: list[str] = []

    def ready() -> bool:
        said = log.read_text()
        assert process.poll() is None, said
        address[:] = re.findall(r"^ready at (\S+)$", said, re.M)
        return bool(address)

    try:
        eventually(ready, seconds=240)
        yield address[0]
    finally:
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=60) == 0


def test_complete(demo: str) -> None:
    questions = json.loads(Path(ROOT / "models/demo/questions.json").read_text())
    prompt = f"Question: {QUESTION}\nAnswer:"
    assert prompt in {question["prompt"] for question in questions if question["split"] == "test"}
    assert piped(["complete", prompt], demo).out.strip() == ANSWER
    assert piped(["complete", prompt, "-t", "1"], demo).out.strip() != ANSWER


def test_complete_with_the_other_expert(demo: str) -> None:
    prompt = "Question: What is a^3 · a^2 if a = 5?\nAnswer:"
    assert piped(["complete", prompt], demo).out.strip() == "a^3 · a^2 = a^5 = 5^5 = 3125."


def test_chat_in_a_pipe(demo: str) -> None:
    result = piped(["chat"], demo, stdin=f"{QUESTION}\n")
    assert (result.status, result.out.strip()) == (0, ANSWER)


def test_chat_in_a_terminal(demo: str, terminal: type[Terminal]) -> None:
    talk = terminal(["chat"], demo)
    talk.see("> ")
    talk.type(f"{QUESTION}\n")
    talk.see("deferral rate 30%")
    assert "\x1b[4;33mS\x1b[0m" in talk.shown
    talk.type("/policy never\n")
    talk.type("/reset\n")
    talk.type(f"{QUESTION}\n")
    talk.see("deferral rate 0%")
    talk.type("/nonsense\n")
    talk.see("error: there is no command /nonsense")
    talk.type("/threshold x\n")
    talk.see("error: 'x' is no number")
    talk.type("/exit\n")
    assert talk.end().status == 0
