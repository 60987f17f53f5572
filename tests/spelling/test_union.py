"""UniTE's step against dictionaries, and the reasons for not taking it."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.blends import Blend
from engine.spelling.mass import Mass
from engine.spelling.speller import SpellingError
from engine.spelling.strand import Strand
from engine.spelling.union import Rule, agreed, most_probable, pick, union
from engine.vllm_hooks.blend import combine
from tests.spelling.test_characters import NAMES, SPELLERS, STOP, model


def table(name: str, row: np.ndarray) -> dict[bytes, float]:
    found: dict[bytes, float] = {}
    for token, chance in enumerate(row):
        string = b"" if token == STOP else SPELLERS[name].vocabulary.bytes_of(token)
        if string is not None:
            found[string] = found.get(string, 0.0) + float(chance)
    total = sum(found.values())
    return {string: chance / total for string, chance in found.items()}


def first(name: str, string: bytes) -> bytes:
    speller = SPELLERS[name]
    tokens: list[int] = []
    with suppress(SpellingError):
        tokens, _ = speller.spell_begun(string)
    return speller.vocabulary.text_of(tokens[:1])


@settings(max_examples=15, deadline=None)
@given(
    names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=3),
    seed=st.integers(0, 10**6),
    top=st.integers(1, 12),
    score=st.sampled_from(["first", "mass"]),
    stop=st.sampled_from([0.0, 12.0]),
)
def test_the_step(names: list[str], seed: int, top: int, score: str, stop: float) -> None:
    rows = [model(seed + k, 1100, sharp=3, stop=stop)(b"") for k in range(len(names))]
    weights = [1 / len(names)] * len(names)
    tables = [table(name, row) for name, row in zip(names, rows, strict=True)]
    strings = {s for t in tables for s in sorted(t, key=lambda s: (-t[s], s))[:top]}
    expected = dict.fromkeys(strings, 0.0)
    for name, chances, weight in zip(names, tables, weights, strict=True):
        scores = {}
        for string in strings:
            if not string or string in chances:
                scores[string] = chances.get(string, 0.0)
            elif score == "mass" and (mass := sum(c for s, c in chances.items() if s.startswith(string))):
                scores[string] = mass
            else:
                scores[string] = chances[start] if (start := first(name, string)) else 0.0
        for string in strings:
            expected[string] += weight * scores[string] / sum(scores.values())
    masses = [Mass(SPELLERS[name].vocabulary, row) for name, row in zip(names, rows, strict=True)]
    got = union([SPELLERS[name] for name in names], masses, weights, top=top, score=score)  # type: ignore[arg-type]
    assert set(got) == strings
    for string in strings:
        assert got[string] == pytest.approx(expected[string], rel=1e-5)
    assert got[most_probable(got)] == max(got.values())
    if len(names) == 1:
        # A member alone writes what it finds most probable.
        assert most_probable(got) == max(tables[0], key=lambda s: tables[0][s])


def test_a_beginning_of_other_tokens_is_their_mass_or_as_published_its_first_token() -> None:
    one, other = SPELLERS["demo pair"], SPELLERS["byte-level, added tokens"]
    rows = [np.zeros(1100, np.float32) for _ in range(2)]
    added = "日本".encode()
    start = one.vocabulary.bytes_of(one.spell(added)[0]) or b""
    assert not one.vocabulary.exact(added)
    rows[0][one.spell(added)[0]] = 1.0
    rows[1][other.vocabulary.exact(added)[0]] = 1.0
    masses = [Mass(s.vocabulary, row) for s, row in zip((one, other), rows, strict=True)]
    # The demo pair's model is sure of the first byte, and the published rule counts that for the whole string too.
    published = union([one, other], masses, [1.0, 0.0], top=1, score="first")
    assert published == {start: 0.5, added: 0.5}


def test_ties_go_to_the_lowest_bytes() -> None:
    assert most_probable({b"b": 0.4, b"a": 0.4, b"": 0.2}) == b"a"


def test_agreement() -> None:
    one, other = SPELLERS["demo pair"].vocabulary, SPELLERS["byte-level, added tokens"].vocabulary

    def mass(vocabulary, **chances: float) -> Mass:  # type: ignore[no-untyped-def]
        row = np.zeros(1100, np.float32)
        for text, chance in chances.items():
            row[STOP if text == "end" else vocabulary.exact(text.encode())[0]] = chance
        return Mass(vocabulary, row)

    both = [0.5, 0.5]
    assert agreed(b"a", [mass(one, a=0.4, b=0.3, c=0.3), mass(other, a=0.4, b=0.3, c=0.3)], both)
    assert agreed(b"a", [mass(one, a=0.9, b=0.1), mass(other, a=0.3, b=0.7)], both)
    assert not agreed(b"a", [mass(one, a=0.6, b=0.4), mass(other, a=0.3, b=0.7)], both)
    assert agreed(b"", [mass(one, end=0.6, b=0.4), mass(other, end=0.9, b=0.1)], both)
    assert not agreed(b"", [mass(one, end=0.6, b=0.4), mass(other, end=0.1, b=0.9)], both)


def test_members_of_one_vocabulary_write_the_union_of_tokens() -> None:
    """What a blend of that kind is where members share their tokens."""
    speller = SPELLERS["demo pair"]
    vocabulary = speller.vocabulary
    rows = torch.stack([torch.as_tensor(model(seed, 1024, sharp=4, stop=3.0)(b"")) for seed in (1, 2)]).float()
    rows[:, [token for token in range(1024) if token != STOP and vocabulary.bytes_of(token) is None]] = 0
    blend = Blend("union", ((0, 0.3), (1, 0.7)), top=8)
    combined = combine(rows.log().unsqueeze(1), blend).logits_AV[0].softmax(-1)
    joint = union([speller] * 2, [Mass(vocabulary, row.numpy()) for row in rows], [0.3, 0.7], top=8)
    assert len(joint) > 8
    for string, chance in joint.items():
        (token,) = vocabulary.exact(string) if string else (STOP,)
        assert chance == pytest.approx(float(combined[token]), rel=1e-4)


@settings(max_examples=30, deadline=None)
@given(
    chances=st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=6),
    rule=st.builds(
        Rule,
        st.sampled_from([0.5, 1.0, 2.0]),
        st.integers(0, 4),
        st.sampled_from([0.3, 1.0]),
        st.sampled_from([0, 0.2]),
    ),
)
def test_what_is_drawn(chances: list[float], rule: Rule) -> None:
    joint = {bytes([number]): chance for number, chance in enumerate(chances)}
    ranked = sorted(joint, key=lambda string: (-joint[string], string))
    kept = [string for string in ranked if (joint[string] / joint[ranked[0]]) ** (1 / rule.temperature) >= rule.min_p]
    kept = kept[: rule.top_k or None]
    heights = [joint[string] ** (1 / rule.temperature) for string in kept]
    nucleus = next(n for n in range(1, len(kept) + 1) if sum(heights[:n]) >= rule.top_p * sum(heights) * (1 - 1e-12))
    drawn = [pick(joint, rule, (number + 0.5) / 200) for number in range(200)]
    assert set(drawn) <= set(kept[: nucleus + 1])
    for string, height in zip(kept, heights[:nucleus], strict=False):
        assert drawn.count(string) / 200 == pytest.approx(height / sum(heights[:nucleus]), abs=0.02)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(NAMES), text=st.text(max_size=30), more=st.text(min_size=1, max_size=20), tell=st.booleans()
)
def test_what_a_strand_followed_can_be_taken_back(name: str, text: str, more: str, tell: bool) -> None:
    strand, other = Strand(SPELLERS[name]), Strand(SPELLERS[name])
    with suppress(SpellingError):
        for each in (strand, other):
            each.follow(text.encode())
            each.tell()
        change = strand.follow(more.encode())
        assert change.kept <= len(other.tokens)
        assert strand.tokens[: change.kept] == other.tokens[: change.kept]
        if tell:
            strand.tell()
        strand.undo(change)
        assert (strand.tokens, strand.ends, strand.text) == (other.tokens, other.ends, other.text)
        keep, tokens = strand.plan()
        assert strand.tokens[:keep] + tokens == other.tokens
        assert tell or not tokens, "the lane never heard of it"
