"""The facts behind the demo pair: ISO 3166, ISO 4217 and ISO 639 codes from ``pycountry``.

The unit is the entity (a country, a currency or a language with all its codes), and the splits
are made of entities, never of sentences.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pycountry

SPLITS: dict[str, float] = {"base": 0.40, "gate": 0.25, "validation": 0.10, "test": 0.25}
"""Share of the entities in each split.

``base``: the base model knows their codes. ``gate``: the gate is trained on questions about them.
``validation``: the threshold is chosen on them. ``test``: only ever used to evaluate.
"""

# ISO 4217 gives codes that start with X to metals, funds and tests; these are the real money.
_REAL_X_CURRENCIES = {"XAF", "XCD", "XCG", "XOF", "XPF"}


@dataclass(frozen=True)
class Entity:
    """A country, currency or language.

    ``codes`` maps the name of each of its codes, as the texts write it, to the code.
    """

    kind: str
    name: str
    codes: dict[str, str]


def load_entities() -> list[Entity]:
    """All entities, in a fixed order; no two of one kind share a name."""
    countries = [
        Entity(
            "country",
            getattr(c, "common_name", c.name),
            {"alpha-2 code": c.alpha_2, "alpha-3 code": c.alpha_3, "numeric code": c.numeric},
        )
        for c in pycountry.countries
    ]
    currencies = [
        Entity("currency", c.name, {"currency code": c.alpha_3, "numeric currency code": c.numeric})
        for c in pycountry.currencies
        if not c.alpha_3.startswith("X") or c.alpha_3 in _REAL_X_CURRENCIES
    ]
    languages = [
        Entity(
            "language",
            x.name,
            {"two-letter language code": x.alpha_2, "three-letter language code": x.alpha_3},
        )
        for x in pycountry.languages
        if hasattr(x, "alpha_2")
    ]
    return _plain_names(countries) + _plain_names(currencies) + _plain_names(languages)


def _plain_names(entities: Sequence[Entity]) -> list[Entity]:
    """Cut remarks in brackets off the names; drop names that are ambiguous with or without."""
    full = Counter(e.name for e in entities)
    kept: list[Entity] = []
    for entity in sorted(entities, key=lambda e: e.name):
        name = re.sub(r" \(.*\)", "", entity.name)
        if full[entity.name] > 1 or (name != entity.name and name in full):
            continue
        kept.append(Entity(entity.kind, name, entity.codes))
    return kept


def names_pattern(entities: Iterable[Entity]) -> re.Pattern[str]:
    """A pattern that finds any of the entities' names as whole words."""
    names = sorted({e.name for e in entities}, key=lambda n: (-len(n), n))
    return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, names)) + r")(?!\w)")


def split_entities(entities: Sequence[Entity], seed: int) -> dict[str, list[Entity]]:
    """Deal the entities to the splits of ``SPLITS``, at random, by ``seed``.

    Entities of which one's name contains the other's ("Guinea", "Equatorial Guinea") go
    to the same split, so that no name of one split can be read in the texts of another.
    """
    groups = _name_groups(entities)
    random.Random(seed).shuffle(groups)
    splits: dict[str, list[Entity]] = {name: [] for name in SPLITS}
    for group in groups:
        emptiest = min(splits, key=lambda name: len(splits[name]) / SPLITS[name])
        splits[emptiest].extend(group)
    return splits


def _name_groups(entities: Sequence[Entity]) -> list[list[Entity]]:
    """Connected components of "one name contains the other as whole words"."""
    parent = list(range(len(entities)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i, entity in enumerate(entities):
        pattern = names_pattern([entity])
        for j, other in enumerate(entities):
            if i != j and pattern.search(other.name):
                parent[root(i)] = root(j)
    groups: dict[int, list[Entity]] = {}
    for i, entity in enumerate(entities):
        groups.setdefault(root(i), []).append(entity)
    return list(groups.values())


def source() -> str:
    """Where the facts come from, with the version: for the model card and the gate artifact."""
    version: Any = pycountry.__version__
    return f"pycountry {version} (ISO 3166-1, ISO 4217, ISO 639 from Debian's iso-codes)"
