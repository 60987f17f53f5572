"""The shelf in shared memory: what one process lays down another one finds, and memory that is short is no crash."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.lanes.shelf import Offer
from engine.vllm_hooks import shared_shelf
from engine.vllm_hooks.shared_shelf import SharedShelf

VOCAB, REQUESTS = 50, 4


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SharedShelf]:
    monkeypatch.setattr(shared_shelf, "FOLDER", tmp_path)
    monkeypatch.setattr(shared_shelf, "_MOST_PER_REQUEST", 10)
    made = SharedShelf.create(lanes=2, requests=REQUESTS, vocab=VOCAB, gate=3)
    yield made
    made.unlink()


def row(seed: int, width: int = VOCAB) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def test_another_process_lays_down(shelf: SharedShelf) -> None:
    code = (
        "import torch; from engine.vllm_hooks.shared_shelf import *; from engine.lanes.shelf import Offer\n"
        f"shelf = SharedShelf(Layout(*{tuple(shelf.layout)!r}))\n"
        "shelf.put(1, 'a', 7, Offer(torch.arange(40.).bfloat16(), torch.tensor([0.5, -2.0])))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert shelf.get(0, "a", 7) is None
    assert shelf.get(1, "a", 6) is None
    found = shelf.get(1, "a", 7)
    assert found is not None
    assert found.row[:40].tolist() == list(map(float, range(40)))
    assert set(found.row[40:].tolist()) == {-torch.inf}, "there is nothing to write in the padding"
    assert found.gate.tolist() == [0.5, -2.0]
    assert len(shelf.held(1)) == 1
    shelf.forget(1, "a")
    assert (shelf.get(1, "a", 7), shelf.held(1), shelf.held(0)) == (None, [], [])


def test_what_is_written_is_settled(shelf: SharedShelf) -> None:
    for index in range(4):
        shelf.put(0, "a", index, Offer(row(index)))
        shelf.put(0, "b", index, Offer(row(10 + index)))
    shelf.put(0, "a", 3, Offer(row(99)))
    shelf.settle(0, "a", 3)
    assert [shelf.get(0, "a", index) is not None for index in range(4)] == [False, False, False, True]
    again = shelf.get(0, "a", 3)
    assert again is not None
    assert torch.equal(again.row, row(99))
    assert again.gate is None
    other = shelf.get(0, "b", 2)
    assert other is not None
    assert torch.equal(other.row, row(12))
    shelf.forget(0, "a")
    shelf.forget(0, "b")
    assert int(shelf._used_L.sum()) == 0


def test_room_for_everybodys_next_position_is_kept(shelf: SharedShelf) -> None:
    slots = shelf.layout.slots
    assert slots == 10 * REQUESTS
    assert shelf.window == slots // 2 // REQUESTS
    laid = 0
    while shelf.has_room:
        shelf.put(0, "drafts", laid, Offer(row(laid)))
        laid += 1
    assert laid == slots // 2 - 2 * REQUESTS + 1
    for number in range(REQUESTS):
        for index in range(shelf.window):
            shelf.put(0, f"scores {number}", index, Offer(row(index)))
            assert shelf.get(0, f"scores {number}", index) is not None
    for index in range(slots):
        shelf.put(0, "more", index, Offer(row(index)))
    assert shelf.get(0, "more", slots - 1) is None, "a full shelf takes nothing more, and stands"
    shelf.put(1, "more", 0, Offer(row(0)))
    assert shelf.get(1, "more", 0) is not None, "lanes have slots of their own"


def test_without_memory_behind_it_a_slot_is_not_written(shelf: SharedShelf, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(shared_shelf.os, "posix_fallocate", full)
    shelf.put(0, "a", 0, Offer(row(0)))
    assert shelf.get(0, "a", 0) is None
    assert shelf.held(0) == []


def test_too_little_shared_memory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_shelf, "FOLDER", tmp_path)
    with pytest.raises(OSError, match=r"MiB free, and [\d,]+ MiB are needed"):
        SharedShelf.create(lanes=2, requests=1 << 16, vocab=1 << 24, gate=1)
    assert list(tmp_path.iterdir()) == []


def test_the_file_has_no_name_once_all_have_opened_it(shelf: SharedShelf) -> None:
    worker = SharedShelf(shelf.layout)
    shelf.unlink()
    worker.put(0, "a", 0, Offer(row(1)))
    found = shelf.get(0, "a", 0)
    assert found is not None
    assert torch.equal(found.row, row(1))
    assert not Path(shelf.layout.path).exists()
