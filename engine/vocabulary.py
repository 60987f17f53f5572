"""Which token ids the members of a pair share, and whether two vocabularies are one for the purpose of writing text.

Vocabularies of models that people pair are often equal in all text tokens and differ in what nobody writes: tokens
added at the end by a fine-tune, a reserved token that was given a name, rows of padding. An id may be written where
every member has it under the same name; every other id is masked in every lane. Only differences among ordinary text
tokens make two vocabularies different. Serving, training and ``collm check`` all follow the rule as written here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

NAMED_ENTRIES = 5
"""How many entries a message names."""

NEGLIGIBLE_SHARE = 100
"""One in so many ordinary tokens may exist on one side only, at the end of its vocabulary: what a fine-tune appended
without declaring it as added (CodeLlama has 16 more than Llama 2's 32,000)."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """A tokenizer's tokens.

    Attributes:
        ids: token -> id, added tokens included.
        added: those that were added to the text model: special tokens, reserved ones, a fine-tune's own.
    """

    ids: Mapping[str, int]
    added: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def names(self) -> dict[int, str]:
        """Id -> token. Where two tokens have one id, the added one names it."""
        names = {token_id: token for token, token_id in self.ids.items()}
        names.update({self.ids[token]: token for token in self.added})
        return names

    @cached_property
    def text_ids(self) -> dict[str, int]:
        """The ordinary tokens: those that text is made of."""
        return {token: token_id for token, token_id in self.ids.items() if token not in self.added}

    @cached_property
    def highest_id(self) -> int:
        """The greatest id of all tokens; -1 without tokens."""
        return max(self.ids.values(), default=-1)

    @cached_property
    def sha256(self) -> str:
        """Of all tokens with their ids."""
        return _sha256(self.ids)

    @cached_property
    def text_sha256(self) -> str:
        """Of the ordinary tokens with their ids."""
        return _sha256(self.text_ids)


@dataclass(frozen=True, eq=False)
class Member:
    """A model, as far as it matters for what it may write.

    Attributes:
        name: "base", or the expert's name.
        rows: outputs of its LM head.
        ends: ids that end a text it writes.
    """

    name: str
    vocabulary: Vocabulary
    rows: int
    ends: tuple[int, ...] = ()


class SharedVocabulary:
    """What the members of a pair may write.

    Args:
        members: the base first.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        base = members[0]
        others = [member.vocabulary.names for member in members[1:]]
        least = min(member.rows for member in members)
        self._members = tuple(members)
        self._shared = frozenset(
            token_id
            for token_id, token in base.vocabulary.names.items()
            if token_id < least and all(names.get(token_id) == token for names in others)
        )
        known = max((token_id for member in members for token_id in member.vocabulary.names), default=-1)
        self.size = min(least, known + 1)
        """Ids from 0 up to here (exclusive) have a row in every member; a prompt is made of these."""
        ends = dict.fromkeys(end for member in members for end in member.ends)
        self.ends = tuple(ends)
        """Ids that end a text, whoever writes it: every member's, the base's first."""

    def __contains__(self, token_id: int) -> bool:
        """Whether every member may write it."""
        return token_id in self._shared

    def masked(self, number: int, *guests: int) -> list[tuple[int, int]]:
        """What a member must not write, as ranges [begin, end) of its outputs, in order.

        Its own ends of text are never masked: a text that ends with one is nobody else's to read.

        Args:
            guests: members whose tokens are sampled along with its own; their ends are not masked either.
        """
        member = self._members[number]
        ends = {end for each in (number, *guests) for end in self._members[each].ends}
        own = {end for end in ends if end < member.rows}
        return list(_gaps(sorted(self._shared | own), member.rows))

    def ends_of(self, number: int) -> list[int]:
        """Ends of text that a member has an output for."""
        return [end for end in self.ends if 0 <= end < self._members[number].rows]

    @property
    def private_ends(self) -> list[int]:
        """Ends of text that not every member may write."""
        return [end for end in self.ends if end not in self._shared]

    def describe(self) -> str | None:
        """One line about what is masked; None if every id of every member may be written."""
        most = max(member.rows for member in self._members)
        names = [member.vocabulary.names for member in self._members]
        apart = [i for i in range(most) if i not in self._shared and any(i in of for of in names)]
        padding = most - len(self._shared) - len(apart)
        parts = []
        if apart:
            shown = "; ".join(self._show(token_id) for token_id in apart[:NAMED_ENTRIES])
            more = ", ..." if len(apart) > NAMED_ENTRIES else ""
            parts.append(f"{len(apart)} that not all members have under one name ({shown}{more})")
        if padding:
            parts.append(f"{padding} that no tokenizer knows")
        if not parts:
            return None
        return f"{len(self._shared)} ids are shared, and masked are {' and '.join(parts)}"

    def _show(self, token_id: int) -> str:
        found = []
        for member in self._members:
            name = member.vocabulary.names.get(token_id)
            shown = "absent" if name is None else repr(name) if token_id < member.rows else f"{name!r} without a row"
            found.append(f"{shown} in {member.name}")
        return f"{token_id} is {' and '.join(dict.fromkeys(found))}"

    def name(self, token_id: int) -> str:
        """The token, as the first member that knows it names it; "" if none does."""
        return next((of for m in self._members if (of := m.vocabulary.names.get(token_id)) is not None), "")


def difference(base: Vocabulary, expert: Vocabulary) -> str | None:
    """What keeps two vocabularies from being one for the purpose of writing text; None if nothing does.

    Returns:
        How many entries differ, and the first of them, for an error message.
    """
    if base.ids == expert.ids:
        return None
    differing: set[str] = set()
    for one, other in ((base, expert), (expert, base)):
        last = max(other.text_ids.values(), default=-1)
        appended: list[str] = []
        for token, token_id in one.text_ids.items():
            if other.ids.get(token) == token_id:
                continue
            there = other.names.get(token_id)
            if there is None and token not in other.ids:
                # Appended by one side, or missing on the other.
                (appended.append if token_id > last else differing.add)(token)
            elif there is None or there not in other.added:
                differing.add(token)
        if len(appended) > len(other.text_ids) // NEGLIGIBLE_SHARE:
            differing.update(appended)
    if not differing:
        return None
    named = "; ".join(
        f"{token!r} is {base.ids.get(token, 'absent')} in the base and {expert.ids.get(token, 'absent')} in the expert"
        for token in sorted(differing)[:NAMED_ENTRIES]
    )
    more = f"; and {len(differing) - NAMED_ENTRIES} more" if len(differing) > NAMED_ENTRIES else ""
    return f"{len(differing)} entries differ: {named}{more}"


def missing_rows(vocabulary: Vocabulary, rows: int) -> str | None:
    """Why a model with so many outputs cannot write its tokenizer's text; None if it can.

    Added tokens without a row are masked, and so are a few ordinary ones at the end.
    """
    beyond = sum(token_id >= rows for token_id in vocabulary.text_ids.values())
    if beyond <= len(vocabulary.text_ids) // NEGLIGIBLE_SHARE:
        return None
    highest = vocabulary.highest_id
    return (
        f"{rows} outputs (vocab_size in config.json), but the tokenizer has ids up to {highest}: "
        f"resize its embedding and LM head to {highest + 1} rows"
    )


def _gaps(kept: Sequence[int], end: int) -> Iterator[tuple[int, int]]:
    """What lies between the ids in ``kept``, which is sorted, up to ``end``."""
    begin = 0
    for token_id in kept:
        if token_id > begin:
            yield begin, token_id
        begin = token_id + 1
    if begin < end:
        yield begin, end


def _sha256(value: Mapping[str, int]) -> str:
    text = json.dumps(dict(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
