"""Made-up entities, from which the base learns to copy names and to doubt unknown codes."""

from __future__ import annotations

import random
import string
from collections import defaultdict
from collections.abc import Sequence

from training.demo.facts import Entity, names_pattern


class MadeUp:
    """Draws entities with made-up names and made-up codes.

    Names are recombined from the words and the letter sequences of ``known`` or strung
    together from ``pieces`` (the tokenizer's), so that any piece may follow any other. No
    name contains a name of ``forbidden`` or is a name of ``known``.
    """

    def __init__(self, known: Sequence[Entity], forbidden: Sequence[Entity], pieces: Sequence[str]) -> None:
        """``pieces`` are texts of tokens, with their leading space where they have one."""
        self._known = known
        self._forbidden = names_pattern(forbidden)
        self._pieces = [p for p in pieces if p.strip().isalpha() or p in ("-", "'", ",", ".")]
        bare = sorted({p.strip() for p in pieces})
        self._code_pieces = [p for p in bare if p.isascii() and p.isalpha() and (p.isupper() or p.islower())]
        self._known_names = {e.name for e in known}
        self._words = [w for e in known for w in e.name.split()]
        self._next: dict[str, list[str]] = defaultdict(list)
        for word in self._words:
            padded = "^^" + word + "$"
            for i in range(2, len(padded)):
                self._next[padded[i - 2 : i]].append(padded[i])

    def entity(self, rng: random.Random) -> Entity:
        """An entity of a random kind: the field names of a real one, all else made up."""
        model = rng.choice(self._known)
        codes = {field: self._code(code, rng) for field, code in model.codes.items()}
        return Entity(model.kind, self.name(rng), codes)

    def name(self, rng: random.Random) -> str:
        """A made-up name of one to seven words or pieces."""
        while True:
            if rng.random() < 0.4:
                words = [self._word(rng) for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4)))]
                name = " ".join(words)
            else:
                name = "".join(rng.choices(self._pieces, k=rng.randint(1, 7))).strip(" ,-'")
            if name.strip(".") and name not in self._known_names and not self._forbidden.search(name):
                return name

    def _word(self, rng: random.Random) -> str:
        return rng.choice(self._words) if rng.random() < 0.4 else self._letters(rng)

    def _letters(self, rng: random.Random) -> str:
        word = "^^"
        while len(word) < 14:
            letter = rng.choice(self._next[word[-2:]])
            if letter == "$":
                break
            word += letter
        return word[2:]

    def _code(self, like: str, rng: random.Random) -> str:
        """A code of the same length and alphabet: of letters or, as often, of pieces."""
        if like.isdigit():
            return "".join(rng.choices(string.digits, k=len(like)))
        alphabet = string.ascii_uppercase if like.isupper() else string.ascii_lowercase
        parts = list(alphabet)
        if rng.random() < 0.5:
            parts = [p for p in self._code_pieces if p[0] in alphabet and len(p) <= len(like)]
        while True:
            code = ""
            while len(code) < len(like):
                code += rng.choice(parts)
            if len(code) == len(like):
                return code
