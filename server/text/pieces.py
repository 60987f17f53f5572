"""One choice's tokens become text, token by token, until a stop string or the engine ends it.

Tokens are released together with their text, so that of every piece the tokens' texts, joined, are the piece's text.
Held back is what could be the beginning of a stop string or of a character.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engine.types import Delta, Look, TokenLogprobs, WrittenWord
from server.text.detokenize import Detokenizer
from server.text.stop import StopMatcher


@dataclass(slots=True)
class Piece:
    """What a choice gained. The per-token lists have the same length, always.

    Attributes:
        text: equals the joined ``token_texts``.
        token_texts: what each token added to the text; "" for special tokens and for the beginning of a character.
        offsets: where each token begins in the choice's text, in characters.
        support: (number of the token in this piece, log-probability with each member) of blended tokens.
        words: those that experts of other vocabularies wrote and that begin in this piece; ``start`` is the number of
            the token in this piece.
        looks: how sure the models were of each token, if the request asked; else empty.
        vetoed: numbers of tokens in this piece for which an expert stood back.
        regretted: numbers of tokens in this piece for which an expert's token was taken back.
        spans: of a text that is not written in tokens: where each of its pieces lies in the answer, in bytes.
        prompt_logprobs: with the first piece if asked for, one entry for each prompt token but the first.
    """

    text: str = ""
    token_texts: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    deferrals: list[float | None] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    offsets: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    support: list[tuple[int, list[float]]] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    words: list[WrittenWord] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    vetoed: list[int] = field(default_factory=list)
    regretted: list[int] = field(default_factory=list)

    def extend(self, other: Piece) -> None:
        """Append the piece that follows."""
        self.support += [(number + len(self.tokens), values) for number, values in other.support]
        self.spans += other.spans
        self.vetoed += [number + len(self.tokens) for number in other.vetoed]
        self.regretted += [number + len(self.tokens) for number in other.regretted]
        self.looks += other.looks
        self.words += [word.moved(len(self.tokens)) for word in other.words]
        self.text += other.text
        self.token_texts += other.token_texts
        self.tokens += other.tokens
        self.sources += other.sources
        self.deferrals += other.deferrals
        self.offsets += other.offsets
        if other.logprobs is not None:
            self.logprobs = (self.logprobs or []) + other.logprobs
        if other.prompt_logprobs is not None:
            self.prompt_logprobs = other.prompt_logprobs
        self.finish_reason = other.finish_reason


class PieceBuilder:
    """Feeds deltas in, takes pieces out.

    Args:
        detokenizer: fresh, for this choice alone.
        stop: stop strings.
        include_stop: leave the stop string (or the text of a stop token) in the text.
        min_tokens: stop strings that are completed before this many tokens are written don't count.
    """

    def __init__(
        self, detokenizer: Detokenizer, *, stop: list[str], include_stop: bool = False, min_tokens: int = 0
    ) -> None:
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stop) if stop else None
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._written = 0
        self._bytes = 0
        self._length = 0
        self._pending = Piece()
        self._pending_chars = 0
        self.finished = False
        """Nothing more is to be fed: a stop string matched, or the last delta was seen."""

    def feed(self, delta: Delta) -> Piece | None:
        """Take in a delta; returns what can be released. Tokens after a stop string are dropped.

        The delta must not be an error.
        """
        pending = self._pending
        stopped = False
        used = 0
        last = len(delta.tokens) - 1
        for index, token in enumerate(delta.texts or delta.tokens):
            final = index == last and delta.finish_reason is not None
            hidden = final and delta.stop_token is not None and delta.stop_token == token and not self._include_stop
            text = "" if hidden else self._detokenizer.push(token)
            if final:
                text += self._detokenizer.flush()
            begin = self._length
            if text.startswith("\ufffd"):
                begin += len(text) if hidden else self._detokenizer.lead(token, text, final=final)
            used += 1
            self._written += 1
            if isinstance(token, bytes):
                pending.spans.append((self._bytes, self._bytes + len(token)))
                self._bytes += len(token)
            pending.token_texts.append(text)
            pending.offsets.append(begin)
            self._length += len(text)
            self._pending_chars += len(text)
            if self._matcher is not None and text:
                match = self._matcher.feed(text, armed=self._written >= self._min_tokens)
                if match is not None:
                    surplus = len(text) - match.end + (0 if self._include_stop else match.length)
                    self._cut(surplus)
                    stopped = True
                    break
        if delta.support:
            before = len(pending.tokens)
            pending.support += [(number + before, values) for number, values in delta.support if number < used]
        pending.words += [word.moved(len(pending.tokens)) for word in delta.words if word.start < used]
        pending.vetoed += [number + len(pending.tokens) for number in delta.vetoed if number < used]
        pending.regretted += [number + len(pending.tokens) for number in delta.regretted if number < used]
        pending.looks += delta.looks[:used]
        pending.tokens += delta.tokens[:used]
        pending.sources += delta.sources[:used]
        pending.deferrals += delta.deferrals[:used]
        if delta.logprobs is not None:
            pending.logprobs = (pending.logprobs or []) + delta.logprobs[:used]
        if delta.prompt_logprobs is not None:
            pending.prompt_logprobs = delta.prompt_logprobs
        if stopped:
            return self._finish("stop")
        if delta.finish_reason is not None:
            if not delta.tokens and (rest := self._detokenizer.flush()) and pending.token_texts:
                pending.token_texts[-1] += rest
            return self._finish("length" if delta.finish_reason == "length" else "stop")
        return self._release()

    def _cut(self, surplus: int) -> None:
        """Take characters off the end of the pending text."""
        texts, offsets = self._pending.token_texts, self._pending.offsets
        self._length -= surplus
        index = len(texts) - 1
        while surplus > 0:
            taken = min(surplus, len(texts[index]))
            if taken:
                texts[index] = texts[index][: len(texts[index]) - taken]
            offsets[index] = min(offsets[index], self._length)
            surplus -= taken
            index -= 1

    def _finish(self, reason: Literal["stop", "length"]) -> Piece:
        self.finished = True
        piece = self._pending
        piece.text = "".join(piece.token_texts)
        piece.finish_reason = reason
        return piece

    def _release(self) -> Piece | None:
        """Release whole tokens whose text is decided. Tokens without text wait for the next ones: they may be the
        beginning of a character.
        """
        free = self._pending_chars - (self._matcher.held if self._matcher is not None else 0)
        if free <= 0:
            return None
        pending = self._pending
        if free == self._pending_chars and pending.token_texts[-1]:
            piece, self._pending = pending, Piece()
        else:
            count = seen = 0
            for index, text in enumerate(pending.token_texts, 1):
                seen += len(text)
                if seen > free:
                    break
                if text:
                    count = index
            if not count:
                return None
            piece, self._pending = _split(pending, count)
        piece.text = "".join(piece.token_texts)
        self._pending_chars -= len(piece.text)
        return piece


def _split(piece: Piece, count: int) -> tuple[Piece, Piece]:
    """The first ``count`` tokens, and the others."""
    logprobs = piece.logprobs
    return (
        Piece(
            "",
            piece.token_texts[:count],
            piece.tokens[:count],
            piece.sources[:count],
            piece.deferrals[:count],
            None if logprobs is None else logprobs[:count],
            piece.prompt_logprobs,
            piece.offsets[:count],
            support=[(number, values) for number, values in piece.support if number < count],
            spans=piece.spans[:count],
            words=[word for word in piece.words if word.start < count],
            looks=piece.looks[:count],
            vetoed=[number for number in piece.vetoed if number < count],
            regretted=[number for number in piece.regretted if number < count],
        ),
        Piece(
            "",
            piece.token_texts[count:],
            piece.tokens[count:],
            piece.sources[count:],
            piece.deferrals[count:],
            None if logprobs is None else logprobs[count:],
            offsets=piece.offsets[count:],
            support=[(number - count, values) for number, values in piece.support if number >= count],
            spans=piece.spans[count:],
            words=[word.moved(-count) for word in piece.words if word.start >= count],
            looks=piece.looks[count:],
            vetoed=[number - count for number in piece.vetoed if number >= count],
            regretted=[number - count for number in piece.regretted if number >= count],
        ),
    )
