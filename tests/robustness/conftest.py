"""One live demo server for whatever does no lasting harm, and one with hardly any room."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.robustness.servers import FaultServer, kv_bytes, serving

KEYS = ["faults-key", "other-key", "third-key"]
KEY, OTHER_KEY, THIRD_KEY = KEYS


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultServer]:
    """The demo pair, with short timeouts and several keys."""
    with serving(
        tmp_path_factory.mktemp("live"),
        key=KEY,
        scheduler__max_num_seqs=16,
        server__api_keys=KEYS,
        server__playground="key",
        server__header_timeout_s=1.5,
        server__body_timeout_s=1.5,
        server__write_timeout_s=3.0,
        server__access_log=False,
    ) as server:
        yield server


@pytest.fixture(scope="session")
def tight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultServer]:
    """The demo pair with KV memory for little more than one long request per lane, prompts computed in small chunks,
    four requests at once and eight that wait; several keys.
    """
    # vLLM accepts no less than what one request of the whole context needs: 32 blocks, and one that holds nobody.
    with serving(
        tmp_path_factory.mktemp("tight"),
        key=KEY,
        base__kv_cache_memory_bytes=kv_bytes("base", 36),
        base__vllm__max_num_batched_tokens=64,
        experts__kv_cache_memory_bytes=kv_bytes("codes", 36),
        experts__vllm__max_num_batched_tokens=64,
        scheduler__max_num_seqs=4,
        server__max_queued_requests=8,
        server__api_keys=KEYS,
        server__playground="key",
        server__access_log=False,
    ) as server:
        yield server
