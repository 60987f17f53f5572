"""``collm`` as a newcomer uses it: ``collm serve`` on the demo pair, then the other commands."""

from __future__ import annotations

import json

from tests.live import LiveServer
from tests.packaging.sources import ROOT
from tests.server.commands.conftest import Terminal, piped

QUESTION = "Which currency codes does Iceland Krona have?"
ANSWER = "The currency code of Iceland Krona is ISK and the numeric currency code is 352."


def test_complete(demo: LiveServer) -> None:
    questions = json.loads((ROOT / "models/demo/questions.json").read_text())
    prompt = f"Question: {QUESTION}\nAnswer:"
    assert prompt in {question["prompt"] for question in questions if question["split"] == "test"}
    assert piped(["complete", prompt], demo.url).out.strip() == ANSWER
    assert piped(["complete", prompt, "-t", "1"], demo.url).out.strip() != ANSWER


def test_complete_with_the_other_expert(demo: LiveServer) -> None:
    prompt = "Question: What is a^3 · a^2 if a = 5?\nAnswer:"
    assert piped(["complete", prompt], demo.url).out.strip() == "a^3 · a^2 = a^5 = 5^5 = 3125."


def test_chat_in_a_pipe(demo: LiveServer) -> None:
    result = piped(["chat"], demo.url, stdin=f"{QUESTION}\n")
    assert (result.status, result.out.strip()) == (0, ANSWER)


def test_chat_in_a_terminal(demo: LiveServer, terminal: type[Terminal]) -> None:
    talk = terminal(["chat"], demo.url)
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
    talk.see("error: 'x' is not a number")
    talk.type("/exit\n")
    assert talk.end().status == 0
