"""The shelf of lanes that compute in processes of their own: rows of fixed width in shared memory.

The file is sparse and has no name once all have opened it. Every lane has slots of its own. Nobody locks, and nobody
has to: a slot is filled by the lane's worker (the first of its shards), in its step; it is emptied by the engine's
process, which tells a lane what changed only between its steps; and it is read by another lane's worker while its
position is not written yet, which is when nobody empties it. (The request may be aborted meanwhile. What is read then,
nobody will look at.)
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from engine.lanes.shelf import DEFAULT_BYTES, Offer, Shelf

FOLDER = Path("/dev/shm")
_FEWEST_PER_REQUEST, _MOST_PER_REQUEST = 8, 128
"""Slots of a lane, for each request that it may hold. Half of them are for drafts, half for windows of scores."""
_HEADER = 3
"""Of a slot: two halves of its request's digest, and its index."""


class Layout(NamedTuple):
    """What a shared shelf is made of; travels to the workers among vLLM's options.

    Attributes:
        lanes: each with as many slots.
        requests: that a lane may hold at once.
        vocab: width of a row of logits; what a model has beyond that is padding.
        gate: widest row of gate values.
    """

    path: str
    lanes: int
    slots: int
    requests: int
    vocab: int
    gate: int

    @property
    def row_bytes(self) -> int:
        """Of a slot's gate values and logits."""
        return 4 * (1 + self.gate + self.vocab)

    @property
    def header_bytes(self) -> int:
        """Before the rows, whole pages."""
        size = 8 * self.lanes * (1 + _HEADER * self.slots)
        return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE

    @property
    def size(self) -> int:
        """Of the file, if every slot was used."""
        return self.header_bytes + self.lanes * self.slots * self.row_bytes


class SharedShelf(Shelf):
    """See :class:`engine.lanes.shelf.Shelf`. An offer that finds no free slot is not laid down."""

    def __init__(self, layout: Layout) -> None:
        """Open the file.

        Raises:
            OSError: it is not there.
        """
        super().__init__()
        self.layout = layout
        self._file = os.open(layout.path, os.O_RDWR)
        memory = mmap.mmap(self._file, layout.size)
        lanes, slots = layout.lanes, layout.slots
        header = np.frombuffer(memory, np.int64, lanes * (1 + _HEADER * slots))
        self._used_L = header[:lanes]
        self._headers_LHS = header[lanes:].reshape(lanes, _HEADER, slots)
        rows = np.frombuffer(memory, np.float32, lanes * slots * layout.row_bytes // 4, layout.header_bytes)
        self._rows_LSW = rows.reshape(lanes, slots, -1)
        self._backed: set[tuple[int, int]] = set()

    @classmethod
    def create(cls, *, lanes: int, requests: int, vocab: int, gate: int) -> SharedShelf:
        """A new one in the machine's shared memory, with room for at most ``DEFAULT_BYTES`` where that is enough.

        Raises:
            OSError: there is too little shared memory.
        """
        row_bytes = Layout("", lanes, 1, requests, vocab, gate).row_bytes
        most = min(DEFAULT_BYTES // (lanes * row_bytes), _MOST_PER_REQUEST * requests)
        slots = max(most, _FEWEST_PER_REQUEST * requests)
        file, path = tempfile.mkstemp(prefix="collm-shelf-", dir=FOLDER)
        layout = Layout(path, lanes, slots, requests, vocab, gate)
        try:
            room = os.statvfs(path)
            free = room.f_bavail * room.f_frsize
            if free < layout.size:
                raise OSError(f"{FOLDER} has {free >> 20:,} MiB free, and {layout.size >> 20:,} MiB are needed")
            os.ftruncate(file, layout.size)
            return cls(layout)
        except BaseException:
            os.unlink(path)
            raise
        finally:
            os.close(file)

    def unlink(self) -> None:
        """Take the file's name away: it lives as long as somebody has it open."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.layout.path)

    @property
    def has_room(self) -> bool:
        """Whether drafts may be laid down; every request may be about to lay down two rows without asking."""
        return bool(self._used_L.max() + 2 * self.layout.requests <= self.layout.slots // 2)

    @property
    def window(self) -> int:
        """Positions of one request that may lie there together without asking."""
        return self.layout.slots // 2 // self.layout.requests

    def put(self, lane: int, request_id: str, index: int, offer: Offer) -> None:
        """Lay an offer down; one that lay there is forgotten."""
        high_S, low_S, index_S = self._headers_LHS[lane]
        digest = _digest(request_id)
        slot = self._slot(lane, digest, index)
        if slot is None:
            free = np.flatnonzero(high_S == 0)
            if not len(free) or not self._is_backed(lane, int(free[0])):
                return
            slot = int(free[0])
            self._used_L[lane] += 1
        row_W = self._rows_LSW[lane, slot]
        layout = self.layout
        row_W[0] = 0 if offer.gate is None else len(offer.gate)
        if offer.gate is not None:
            row_W[1 : 1 + len(offer.gate)] = offer.gate.float().cpu().numpy()
        logits_V = offer.row[: layout.vocab].float().cpu().numpy()
        row_W[1 + layout.gate : 1 + layout.gate + len(logits_V)] = logits_V
        row_W[1 + layout.gate + len(logits_V) :] = -np.inf
        high_S[slot], low_S[slot], index_S[slot] = *digest, index

    def get(self, lane: int, request_id: str, index: int) -> Offer | None:
        """The lane's offer at a position; it stays, and is valid as long as the position is not written."""
        slot = self._slot(lane, _digest(request_id), index)
        if slot is None:
            return None
        row_W, gate = torch.from_numpy(self._rows_LSW[lane, slot]), self.layout.gate
        values = int(row_W[0])
        return Offer(row_W[1 + gate :], row_W[1 : 1 + values] if values else None)

    def take(self, lane: int, request_id: str, index: int) -> Offer | None:
        """Nobody's here: distributions over byte strings do not leave their process.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("a shared shelf holds rows of logits only")

    def is_empty(self, lane: int) -> bool:
        """Whether nothing of the lane's is lying there."""
        return not self._used_L[lane]

    def settle(self, lane: int, request_id: str, final: int) -> None:
        """The first ``final`` tokens are written: nobody will ask for their positions again."""
        if not self.is_empty(lane):
            self._empty(lane, self._of(lane, _digest(request_id)) & (self._headers_LHS[lane, 2] < final))

    def forget(self, lane: int, request_id: str) -> None:
        """The lane holds the request no more."""
        if self._used_L[lane]:
            self._empty(lane, self._of(lane, _digest(request_id)))

    def held(self, lane: int) -> list[str]:
        """Requests of which the lane has something there, by their digests."""
        high_S, low_S, _ = self._headers_LHS[lane].view(np.uint64)
        return sorted({f"{high_S[slot]:016x}{low_S[slot]:016x}" for slot in np.flatnonzero(high_S)})

    def _of(self, lane: int, digest: tuple[int, int]) -> NDArray[np.bool_]:
        high_S, low_S, _ = self._headers_LHS[lane]
        return np.asarray((high_S == digest[0]) & (low_S == digest[1]))

    def _slot(self, lane: int, digest: tuple[int, int], index: int) -> int | None:
        found = np.flatnonzero(self._of(lane, digest) & (self._headers_LHS[lane, 2] == index))
        return int(found[0]) if len(found) else None

    def _empty(self, lane: int, which_S: NDArray[np.bool_]) -> None:
        self._headers_LHS[lane, 0, which_S] = 0
        self._used_L[lane] -= int(which_S.sum())

    def _is_backed(self, lane: int, slot: int) -> bool:
        """Whether there is memory behind a slot; writing where there is none would end the process."""
        if (lane, slot) not in self._backed:
            layout = self.layout
            try:
                begin = layout.header_bytes + (lane * layout.slots + slot) * layout.row_bytes
                os.posix_fallocate(self._file, begin, layout.row_bytes)
            except OSError:
                return False
            self._backed.add((lane, slot))
        return True


def _digest(request_id: str) -> tuple[int, int]:
    """Two numbers of 64 bits; the first is never 0."""
    digest = hashlib.blake2b(request_id.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little", signed=True) or 1, int.from_bytes(digest[8:], "little", signed=True)
