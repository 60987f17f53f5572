from __future__ import annotations

import pytest

from bench.shapes import Pair, get_pair, quick_dtype


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return get_pair("tiny", tmp_path_factory.mktemp("models"), dtype=quick_dtype("tiny"))
