"""Which tests run in one process where pytest-xdist spreads them over several, as ``make test`` does.

A plugin of pytest. A file's tests stay together, and so do files that share a live server or engines, which are started
once then. These groups take longest and come first, since the last one is waited for. (pytest-xdist has marks for this,
``--dist loadgroup``, which its version 3.8 loses with pytest 9.2.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

FILES = {
    "engines of the random pair": (
        "tests/oracle/test_aborts.py",
        "tests/oracle/test_greedy.py",
        "tests/oracle/test_members.py",
        "tests/oracle/test_parameters.py",
        "tests/oracle/test_sampling.py",
        "tests/oracle/test_structured.py",
    ),
    "mistreated servers": (
        "tests/robustness/test_bad_input.py",
        "tests/robustness/test_clients_gone.py",
        "tests/robustness/test_kv_pressure.py",
        "tests/robustness/test_load.py",
        "tests/robustness/test_security.py",
        "tests/robustness/test_transport.py",
    ),
    "a twin of the base": ("tests/oracle/test_formats.py", "tests/oracle/test_run_ahead.py"),
    "the demo's server": (
        "tests/docs/test_examples.py",
        "tests/server/commands/test_demo.py",
        "tests/server/live/test_sdk.py",
        "tests/server/live/test_vllm_fields.py",
        "tests/server/playground/test_playground.py",
        "tests/server/playground/test_reading.py",
        "tests/server/playground/test_reference.py",
        "tests/server/playground/test_runs.py",
    ),
}
FIXTURES = ("kept_engines", "live", "tight", "twin_engine", "demo")
"""Those that take a server or engines for a whole run."""
GROUPS = {file: group for group, files in FILES.items() for file in files}


def group_of(nodeid: str) -> str:
    file = nodeid.partition("::")[0]
    return GROUPS.get(file, file)


def check(items: Iterable[pytest.Item]) -> None:
    """Raises: pytest.UsageError: tests of two groups would start the same engines twice."""
    users: dict[str, set[str]] = {name: set() for name in FIXTURES}
    for item in items:
        for name in users.keys() & set(getattr(item, "fixturenames", ())):
            users[name].add(group_of(item.nodeid))
    for name, groups in users.items():
        if len(groups) > 1:
            raise pytest.UsageError(f"{__name__}: put into one group all that use {name!r}, now in {sorted(groups)}")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the long groups first, in processes of pytest-xdist."""
    check(items)
    if hasattr(config, "workerinput"):
        order = list(FILES)
        items.sort(key=lambda item: order.index(group) if (group := group_of(item.nodeid)) in FILES else len(order))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    # Not by the number of tests, which says nothing of how long they take.
    config.option.loadscopereorder = False
    return Groups(config, log)
