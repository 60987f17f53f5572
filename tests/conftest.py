"""For all tests."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# How long an example takes says more of the machine's other work than of the code; pytest's timeout bounds each test.
# In CI the same examples every time.
settings.register_profile(
    "collm",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="CI" in os.environ,
    print_blob=True,
)
settings.load_profile("collm")
