"""Which tests run in one process where pytest-xdist spreads them over several, as ``make test`` does.

A plugin of pytest. A file's tests stay together, and so do files that share a live server or engines, which are started
once then. These groups take longest and come first, since the last one is waited for. (pytest-xdist has marks for this,
``--dist loadgroup``, which its version 3.8 loses with pytest 9.2.)
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SHARED = {
    "engines of the random pair": r"\b(engine_of|plain_engine)\b",
    "servers that are mistreated": r"\b(live|tight): FaultServer\b",
    "a twin of the base": r"\btwin_engine\b",
    "the demo's server": r"\bdemo: LiveServer\b|\bclient: openai\b",
}
"""Group -> how files look that use its fixtures, which take engines or a server for a whole run. The longest first."""


@cache
def _group_of_file(file: str) -> str:
    text = (ROOT / file).read_text(encoding="utf-8")
    return next((group for group, looks in SHARED.items() if re.search(looks, text)), file)


def group_of(nodeid: str) -> str:
    return _group_of_file(nodeid.partition("::")[0])


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the long groups first, in processes of pytest-xdist."""
    if hasattr(config, "workerinput"):
        order = list(SHARED)
        items.sort(key=lambda item: order.index(group) if (group := group_of(item.nodeid)) in SHARED else len(order))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    # Not by the number of tests, which says nothing of how long they take.
    config.option.loadscopereorder = False
    return Groups(config, log)
