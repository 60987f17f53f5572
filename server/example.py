"""The request that is printed when the server is ready."""

from __future__ import annotations

import contextlib
import json
import shlex
from typing import Any

from server.service import Service
from server.text.chat_template import ChatTemplateError

GENERAL_PROMPT = "The three most important things to remember are"
GENERAL_MESSAGE = "What do you know best?"


def example_question(service: Service) -> dict[str, Any]:
    """The pair's own question as ``messages``, and as ``prompt``: what its chat template makes of it, if it has one."""
    question = service.settings.example_prompt
    if question is None:
        return {}
    messages = [{"role": "user", "content": question}]
    prompt = question
    if service.chat_template is not None:
        with contextlib.suppress(ChatTemplateError):  # it is for requests to say what is wrong with a template
            prompt = service.chat_template.render(messages)
    return {"prompt": prompt, "messages": messages}


def example_command(service: Service, url: str) -> str:
    """A curl command that asks the pair a question of its own (``example_prompt``): by chat where it has a template."""
    settings = service.settings
    model = service.models.name
    body: dict[str, Any]
    if service.chat_template is not None:
        path = "/v1/chat/completions"
        body = {"model": model, "messages": [{"role": "user", "content": settings.example_prompt or GENERAL_MESSAGE}]}
    else:
        path = "/v1/completions"
        body = {"model": model, "prompt": settings.example_prompt or GENERAL_PROMPT}
    body |= {"max_tokens": 64, "temperature": 0}
    key = " -H 'Authorization: Bearer YOUR_KEY'" if settings.server.all_keys else ""
    text = json.dumps(body, ensure_ascii=False)
    return f"curl {url}{path} -H 'Content-Type: application/json'{key} -d {shlex.quote(text)}"
