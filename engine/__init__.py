"""The collaborative engine: a base and its experts behind one scheduler.

Speaks token ids only; text belongs to ``server``. Imports neither fastapi nor anything of ``server``.
Start at :mod:`engine.offline` (scripts) or :mod:`engine.client` (an event loop), which everything outside this package
talks to.
"""
