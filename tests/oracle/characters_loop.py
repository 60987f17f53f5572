"""CharED without the engine: one plain loop over Hugging Face models that re-tokenises everything at every step.

Written from the paper and from what docs/strategies.md says of corner cases; shares nothing with the engine but the
uniform draws. Dictionaries of byte strings are filtered symbol by symbol, as published.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers

END = -1
EPSILON = 256
"""Symbols beside the 256 bytes; in the order of ties EPSILON comes after all bytes and END after it."""


@dataclass
class Written:
    """What one request got, and how near its symbols came to others."""

    pieces: list[bytes] = field(default_factory=list)
    finish_reason: str = "length"
    margins: list[float] = field(default_factory=list)


@dataclass
class Member:
    """One model in the loop."""

    model: Any
    tokenizer: Tokenizer
    end: int
    prompt: list[int]
    strand: list[int] = field(default_factory=list)
    history: list[tuple[bytes, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        alphabet = dict(zip(_bytes_in_order(), _letters_in_order(), strict=True))
        back = {letter: byte for byte, letter in alphabet.items()}
        special = {token for token, entry in self.tokenizer.get_added_tokens_decoder().items() if entry.special}
        self.bytes_of = {
            token: bytes(back[letter] for letter in name)
            for name, token in self.tokenizer.get_vocab().items()
            if token not in special
        }

    def dictionary(self) -> dict[bytes, float]:
        """Probability of each byte string; b"" is the end of the text."""
        ids = torch.tensor([[*self.prompt, *self.strand]])
        with torch.no_grad():
            logits = self.model(ids).logits[0, -1].float()
        probabilities = torch.softmax(logits, -1).double()
        found: dict[bytes, float] = {b"": float(probabilities[self.end])}
        for token, data in self.bytes_of.items():
            found[data] = found.get(data, 0.0) + float(probabilities[token])
        total = sum(found.values())
        return {data: value / total for data, value in found.items()}

    def token_for(self, data: bytes) -> int | None:
        return next((token for token, own in self.bytes_of.items() if own == data), None)


def write(
    members: Sequence[Member],
    weights: Sequence[float],
    *,
    draw: Callable[[int], float],
    temperature: float = 1.0,
    average: str = "mixture",
    max_pieces: int = 20,
    min_pieces: int = 0,
) -> Written:
    """Write one text.

    Args:
        draw: the uniform number for the symbol with this index.
    """
    whole = Written()
    text = b""
    while len(whole.pieces) < max_pieces:
        tables = [member.dictionary() for member in members]
        piece = b""
        logs = [0.0] * len(members)
        while True:
            rows = [_symbols(table, piece) for table in tables]
            alive = [n for n, row in enumerate(rows) if row and logs[n] > -math.inf]
            row = _average([rows[n] for n in alive], [weights[n] for n in alive], average)
            if not piece and len(whole.pieces) < min_pieces:
                row = _without(row, END)
            if piece and len(members) > 1 and _unfinished(text + piece):
                row = _without(row, EPSILON)
            symbol, margin = _choose(row, temperature, draw(len(text) + len(piece) + len(whole.pieces)))
            whole.margins.append(margin)
            for n, own in enumerate(rows):
                chance = own.get(symbol, 0.0) if own and logs[n] > -math.inf else 0.0
                logs[n] = logs[n] + math.log(chance) if chance > 0 else -math.inf
            if symbol == END:
                whole.finish_reason = "stop"
                return whole
            if symbol == EPSILON:
                break
            piece += bytes([symbol])
        loudest = max(logs)
        for n, member in enumerate(members):
            member.history.append((piece, logs[n] >= loudest - 1e-9))
            member.strand = follow(member, member.history)
        text += piece
        whole.pieces.append(piece)
    return whole


def _symbols(table: dict[bytes, float], piece: bytes) -> dict[int, float]:
    found: dict[int, float] = {}
    for data, chance in table.items():
        if not piece and data == b"":
            found[END] = found.get(END, 0.0) + chance
        elif data == piece:
            found[EPSILON] = found.get(EPSILON, 0.0) + chance
        elif data.startswith(piece) and data:
            found[data[len(piece)]] = found.get(data[len(piece)], 0.0) + chance
    total = sum(found.values())
    return {symbol: value / total for symbol, value in found.items()} if total > 0 else {}


def _average(rows: list[dict[int, float]], weights: list[float], kind: str) -> dict[int, float]:
    shares = [weight / sum(weights) for weight in weights]
    common = set.intersection(*(({s for s, p in row.items() if p > 0}) for row in rows))
    if kind == "geometric" and common:
        joint = {
            s: math.exp(sum(share * math.log(row[s]) for share, row in zip(shares, rows, strict=True))) for s in common
        }
    else:
        joint = {}
        for share, row in zip(shares, rows, strict=True):
            for s, p in row.items():
                joint[s] = joint.get(s, 0.0) + share * p
    total = sum(joint.values())
    return {s: p / total for s, p in joint.items()}


def _without(row: dict[int, float], symbol: int) -> dict[int, float]:
    others = {s: p for s, p in row.items() if s != symbol}
    total = sum(others.values())
    return {s: p / total for s, p in others.items()} if total > 0 else row


def _choose(row: dict[int, float], temperature: float, uniform: float) -> tuple[int, float]:
    """A symbol, and how far the decision was from another one."""
    order = sorted(row, key=lambda s: 257 if s == END else s)
    if temperature == 0:
        ranked = sorted((row[s] for s in order), reverse=True)
        best = max(order, key=lambda s: row[s])
        return best, ranked[0] - ranked[1] if len(ranked) > 1 else 1.0
    powers = [row[s] ** (1 / temperature) for s in order]
    total, seen, margin = sum(powers), 0.0, 1.0
    chosen = order[-1]
    for s, power in zip(order, powers, strict=True):
        if seen <= uniform * total < seen + power:
            chosen = s
        seen += power
        margin = min(margin, abs(seen / total - uniform))
    return chosen, margin


def _unfinished(text: bytes) -> bool:
    """Whether a text ends amid a character: with up to three more bytes it would be one."""
    for back in range(1, min(3, len(text)) + 1):
        tail = text[-back:]
        lead = tail[0]
        needed = 2 if 0xC2 <= lead <= 0xDF else 3 if 0xE0 <= lead <= 0xEF else 4 if 0xF0 <= lead <= 0xF4 else 0
        if needed:
            return back < needed and all(byte & 0xC0 == 0x80 for byte in tail[1:])
        if lead & 0xC0 != 0x80:
            return False
    return False


def _bytes_in_order() -> list[int]:
    plain = [byte for byte in range(256) if 0x21 <= byte <= 0x7E or (byte >= 0xA1 and byte != 0xAD)]
    return plain + [byte for byte in range(256) if byte not in plain]


def _letters_in_order() -> list[str]:
    plain = [byte for byte in range(256) if 0x21 <= byte <= 0x7E or (byte >= 0xA1 and byte != 0xAD)]
    letters = [chr(byte) for byte in plain] + [chr(0x100 + n) for n in range(256 - len(plain))]
    assert sorted(letters) == sorted(pre_tokenizers.ByteLevel.alphabet())
    return letters


def follow(member: Member, history: Sequence[tuple[bytes, bool]]) -> list[int]:
    """A member's tokens for a text, from nothing: own tokens stay, foreign text is spelled anew from the last safe
    boundary before it.

    Args:
        history: the text's pieces, and of each whether the member goes on from a token of its own.
    """
    tokens: list[int] = []
    text = b""
    for piece, own in history:
        before, text = len(text), text + piece
        if own and (token := member.token_for(piece)) is not None:
            tokens.append(token)
            continue
        ends = [0]
        for token in tokens:
            ends.append(ends[-1] + len(member.bytes_of[token]))
        restart = max((i for i in range(1, before + 1) if i in ends and _safe(member, text, i)), default=0)
        kept = ends.index(restart)
        tokens = tokens[:kept] + _encode(member, text[restart:])
    assert b"".join(member.bytes_of[token] for token in tokens) == text
    return tokens


MARKS = tuple(bytes([mark]) for mark in b',.;:!?()[]{}"<>=+*/\\|&%$#@^~')
BETWEEN_DIGITS = tuple(bytes([mark]) for mark in b",.:=+*/^")


def _safe(member: Member, text: bytes, at: int) -> bool:
    """Whether all byte-level tokenizers in use have a boundary here, whatever else the text has."""
    if at >= len(text):
        return False
    before, after = text[at - 1 : at], text[at : at + 1]
    if after == b" ":
        return _behind_no_space(text[:at])
    if after in (b"\r", b"\n"):
        return before.isalnum()
    if after.isdigit() and before == b" ":
        # Some families take the space to the number, and have a token that does.
        joined = any(b" " + digit in own for own in member.bytes_of.values() for digit in _DIGITS)
        return not joined and _behind_no_space(text[: at - 1])
    if after.isdigit():
        return before in BETWEEN_DIGITS
    return before.isalnum() and after in MARKS


_DIGITS = [bytes([digit]) for digit in b"0123456789"]


def _behind_no_space(text: bytes) -> bool:
    last = text[-1:]
    return last > b" " and last != b"\x7f" and text.decode("utf-8", "replace")[-1:].strip() != ""


def _encode(member: Member, text: bytes) -> list[int]:
    """As the tokenizer has it; bytes that are no characters by the longest tokens that match."""
    tokens: list[int] = []
    while text:
        try:
            good, bad, rest = text.decode(), b"", b""
        except UnicodeDecodeError as error:
            good, bad, rest = text[: error.start].decode(), text[error.start : error.end], text[error.end :]
        tokens += member.tokenizer.encode(good, add_special_tokens=False).ids
        while bad:
            data = max((own for own in member.bytes_of.values() if bad.startswith(own)), key=len)
            tokens.append(member.token_for(data) or 0)
            bad = bad[len(data) :]
        text = rest
    return tokens
