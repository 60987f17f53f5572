"""Characters: members write one text byte by byte, each in its own tokens (CharED). See ``strategy.py``."""

from engine.strategies.characters.strategy import Characters

__all__ = ["Characters"]
