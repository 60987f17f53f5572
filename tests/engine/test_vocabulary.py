"""Which ids the members of a pair may write, and which vocabularies are one."""

from __future__ import annotations

import pytest

from engine.vocabulary import Member, SharedVocabulary, Vocabulary, difference, missing_rows

TEXT = {f"t{number}": number for number in range(400)}


def vocabulary(added: dict[str, int] | None = None, text: dict[str, int] | None = None) -> Vocabulary:
    added = added or {}
    return Vocabulary((TEXT if text is None else text) | added, frozenset(added))


def members(*given: tuple[Vocabulary, int, tuple[int, ...]]) -> SharedVocabulary:
    names = ["base", *(f"e{number}" for number in range(1, len(given)))]
    return SharedVocabulary([Member(name, *one) for name, one in zip(names, given, strict=True)])


BASE = vocabulary({"<s>": 400, "<reserved>": 401})


@pytest.mark.parametrize(
    "expert",
    [
        vocabulary({"<s>": 400, "<reserved>": 401}),
        vocabulary({"<s>": 400, "<named>": 401}),  # one renamed
        vocabulary({"<s>": 400, "<reserved>": 401, "<pad>": 402}),  # one added
        vocabulary({"<s>": 400, "<reserved>": 401} | {f"<a{n}>": 402 + n for n in range(17)}),
        vocabulary({"<s>": 400}),  # one missing
        vocabulary({"<s>": 400, "<reserved>": 401}, TEXT | {"appended": 402, "too": 403}),  # not declared as added
        vocabulary({"<s>": 400, "<reserved>": 401, "t5": 5}),  # an ordinary token made special
    ],
)
def test_what_nobody_writes_makes_no_difference(expert: Vocabulary) -> None:
    assert difference(BASE, expert) is None
    assert difference(expert, BASE) is None


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        (TEXT | {"t3": 4, "t4": 3}, 2),  # swapped
        ({k: v for k, v in TEXT.items() if k != "t9"} | {"other": 9}, 2),  # another token at its place
        ({k: v for k, v in TEXT.items() if k != "t9"}, 1),  # missing in the middle
        ({k: v for k, v in TEXT.items() if v < 200}, 200),  # half of it
        (TEXT | {f"more{n}": 402 + n for n in range(40)}, 40),  # another language added
    ],
)
def test_differences_among_text_tokens_are_named(text: dict[str, int], entries: int) -> None:
    other = vocabulary({"<s>": 400, "<reserved>": 401}, text)
    for one, two in ((BASE, other), (other, BASE)):
        found = difference(one, two)
        assert found is not None
        assert found.startswith(f"{entries} entries differ: ")
    assert "in the base and" in str(difference(BASE, other))


def test_ids_that_are_not_shared_are_masked_everywhere() -> None:
    expert = vocabulary({"<s>": 400, "<named>": 401, "<pad>": 402})
    shared = members((BASE, 410, ()), (expert, 403, ()))
    assert shared.size == 403
    assert shared.masked(0) == [(401, 410)]
    assert shared.masked(1) == [(401, 403)]
    assert 400 in shared
    assert 401 not in shared
    line = shared.describe()
    assert line is not None
    assert line.startswith("401 ids are shared, and masked are 2 that not all members have under one name (401 is ")
    assert "'<reserved>' in base and '<named>' in e1" in line
    assert line.endswith("and 7 that no tokenizer knows")


def test_nothing_is_said_where_nothing_is_masked() -> None:
    assert members((BASE, 402, ()), (BASE, 402, ())).describe() is None


def test_a_token_without_a_row_is_masked() -> None:
    padded = vocabulary({"<s>": 400, "<reserved>": 401, "[PAD]": 402})
    shared = members((padded, 402, ()), (BASE, 402, ()))
    assert shared.size == 402
    assert shared.masked(0) == []
    assert missing_rows(padded, 402) is None
    assert missing_rows(BASE, 300) == (
        "300 outputs (vocab_size in config.json), but the tokenizer has ids up to 401: "
        "resize its embedding and LM head to 402 rows"
    )


def test_ends_are_everybodys_and_ones_own_are_never_masked() -> None:
    """As of an instruct expert that added its end of turn, and of one that gave the base's another name."""
    base = vocabulary({"<s>": 400, "<|im_end|>": 401})
    expert = vocabulary({"<s>": 400, "<|Assistant|>": 401, "<|end|>": 402})
    shared = members((base, 402, (401, 400)), (expert, 403, (402,)))
    assert shared.ends == (401, 400, 402)
    assert shared.masked(0) == []
    assert shared.masked(1) == [(401, 402)]
    assert (shared.ends_of(0), shared.ends_of(1)) == ([401, 400], [401, 400, 402])
    assert shared.private_ends == [401, 402]
