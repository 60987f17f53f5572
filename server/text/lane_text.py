"""How one lane reads and writes text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from engine.spelling.guard import SpecialTokenGuard
from server.text.chat_template import ChatTemplate
from server.text.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True, eq=False)
class LaneText:
    """A tokenizer with what belongs to it.

    Attributes:
        chat_template: None where there is none.
        guard: keeps special tokens out of messages; None where clients may bring them.
    """

    tokenizer: TextTokenizer
    chat_template: ChatTemplate | None
    guard: SpecialTokenGuard | None

    @classmethod
    def of(cls, tokenizer: TextTokenizer, special_tokens: Literal["text", "token"]) -> Self:
        """With the chat template that comes with a tokenizer.

        Args:
            special_tokens: what their names in messages are.

        Raises:
            TokenizerError: the template cannot be compiled.
        """
        template = ChatTemplate.find(tokenizer)
        guarded = template is not None and special_tokens == "text"
        return cls(tokenizer, template, tokenizer.guard(template.source) if guarded and template else None)
