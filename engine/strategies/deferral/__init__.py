"""Deferral: a policy decides for every token which model writes it. See ``strategy.py``."""

from engine.strategies.deferral.strategy import Deferral

__all__ = ["Deferral"]
