"""The command that is printed when the server is ready: a shell takes it, and the server answers it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from server.example import GENERAL_PROMPT, example_command
from server.service import Service
from server.settings import Settings
from server.text.tokenizer import TextTokenizer
from tests.server.fakes import byte_level_tokenizer

URL = "http://127.0.0.1:8000"


def service(folder: Path, *, template: str | None = None, **settings: object) -> Service:
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    values = {"base": {"model": str(folder)}, "served_model_name": "pair", **settings}
    return Service(Settings.model_validate(values), TextTokenizer.load(str(folder), 1))


def body(command: str) -> tuple[str, dict[str, object]]:
    """The address and the request, as a shell reads the command."""
    words = shlex.split(command)
    return words[1], json.loads(words[words.index("-d") + 1])


@pytest.mark.parametrize("prompt", [None, "Question: 'Who's there?'\nAnswer:", 'a "b" \\ c', "日本"])
def test_a_pair_without_a_template_continues_its_prompt(tmp_path: Path, prompt: str | None) -> None:
    address, sent = body(example_command(service(tmp_path, example_prompt=prompt), URL))
    assert address == f"{URL}/v1/completions"
    assert (sent["model"], sent["prompt"]) == ("pair", prompt or GENERAL_PROMPT)


def test_a_pair_with_a_template_is_spoken_to(tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    address, sent = body(example_command(service(tmp_path, template=template, example_prompt="Who?"), URL))
    assert address == f"{URL}/v1/chat/completions"
    assert sent["messages"] == [{"role": "user", "content": "Who?"}]


def test_a_key_is_asked_for_and_not_shown(tmp_path: Path) -> None:
    command = example_command(service(tmp_path, server={"api_keys": ["my-secret-key"]}), URL)
    assert "YOUR_KEY" in command
    assert "my-secret-key" not in command
