"""Deferral over several vocabularies: experts write whole words into the base's text. See ``strategy.py``."""

from engine.strategies.words.strategy import Words

__all__ = ["Words"]
