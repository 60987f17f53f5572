"""What is wrong with a form."""

from __future__ import annotations


class FormError(ValueError):
    """A form that cannot be followed to the letter; the message names the part at fault and is safe to show."""


def shown(value: object, limit: int = 60) -> str:
    """A user's value, quoted for a message: cut, printable, on one line."""
    text = value if isinstance(value, str) else repr(value)
    safe = "".join(char if char.isprintable() else "?" for char in text[:limit])
    return f"'{safe}{'...' if len(text) > limit else ''}'"
