"""Unions over several vocabularies: UniTE's average of strings, where SAFE's checks let it. See ``strategy.py``."""

from engine.strategies.unions.strategy import Unions

__all__ = ["Unions"]
