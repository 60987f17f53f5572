"""CharED against the published loop over dictionaries, symbol for symbol, and what must hold whatever the models."""

from __future__ import annotations

import codecs
import zlib
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from engine import draws
from engine.spelling.chorus import Chorus
from engine.spelling.mass import END, EXACT, Mass
from engine.spelling.speller import Speller
from engine.spelling.symbols import choose, inside_character
from engine.spelling.vocabulary import Vocabulary
from tests.server.zoo import zoo

STOP = 2
NAMES = ("SentencePiece BPE, legacy", "byte-level, added tokens", "demo pair")
Model = Callable[[bytes], "np.ndarray"]


def speller(name: str) -> Speller:
    """With a token that ends texts."""
    tokenizer = zoo(name)
    return Speller(tokenizer, Vocabulary(tokenizer, stops=[STOP]))


SPELLERS = {name: speller(name) for name in NAMES}


def model(seed: int, size: int, *, sharp: float, stop: float) -> Model:
    """A next-token distribution that depends on the whole text; float32, as from a lane."""

    def probabilities(text: bytes) -> np.ndarray:
        scores = np.random.default_rng(zlib.crc32(text, seed)).normal(size=size).astype(np.float32) * np.float32(sharp)
        scores[STOP] += np.float32(stop)
        row = np.exp(scores - scores.max())
        return row / row.sum()

    return probabilities


def naive(
    vocabularies: Sequence[Vocabulary],
    models: Sequence[Model],
    weights: Sequence[float],
    *,
    geometric: bool,
    temperature: float,
    draw: Callable[[int], float],
    pieces: int,
    least: int = 0,
    endless: bool = False,
) -> tuple[list[bytes], bool]:
    """The published loop: tables of strings, filtered and stripped character by character, asked anew at each end."""
    text, written = b"", []
    number = 0
    while len(written) < pieces:
        tables: list[dict[bytes | str, float]] = []
        for vocabulary, ask in zip(vocabularies, models, strict=True):
            table: dict[bytes | str, float] = {}
            for token, chance in enumerate(map(float, ask(text))):
                if token == STOP:
                    table["end"] = table.get("end", 0.0) + chance
                elif (string := vocabulary.bytes_of(token)) is not None:
                    table[string] = table.get(string, 0.0) + chance
            tables.append(table)
        piece = b""
        while True:
            symbols: list[dict[int, float]] = []
            voices: list[float] = []
            for table, weight in zip(tables, weights, strict=True):
                total = sum(table.values())
                if total == 0:
                    continue
                following: dict[int, float] = {}
                for string, chance in table.items():
                    symbol = END if string == "end" else string[0] if string else EXACT
                    following[symbol] = following.get(symbol, 0.0) + chance / total  # type: ignore[index]
                symbols.append(following)
                voices.append(weight)
            joint = {}
            for symbol in range(258):
                chances = [following.get(symbol, 0.0) for following in symbols]
                if geometric:
                    joint[symbol] = float(
                        np.prod([c ** (w / sum(voices)) for c, w in zip(chances, voices, strict=True)])
                    )
                else:
                    joint[symbol] = sum(c * w for c, w in zip(chances, voices, strict=True)) / sum(voices)
            if geometric and not any(joint.values()):
                joint = {s: sum(f.get(s, 0.0) * w for f, w in zip(symbols, voices, strict=True)) for s in range(258)}
            barred = END if not piece and (endless or len(written) < least) else None
            if piece and len(models) > 1:
                decoder = codecs.getincrementaldecoder("utf-8")("replace")
                decoder.decode(text + piece)
                if decoder.getstate()[0]:  # bytes that wait for the rest of their character
                    barred = EXACT
            if barred is not None and any(chance for symbol, chance in joint.items() if symbol != barred):
                joint[barred] = 0.0
            if temperature == 0:
                drawn = min(joint, key=lambda symbol: (-joint[symbol], symbol))
            else:
                scale = sum(chance ** (1 / temperature) for chance in joint.values())
                mark, drawn = draw(number) * scale, -1
                for symbol, chance in joint.items():
                    mark -= chance ** (1 / temperature)
                    if mark < 0:
                        drawn = symbol
                        break
            number += 1
            if drawn == END:
                return written, True
            if drawn == EXACT:
                break
            piece += bytes([drawn])
            tables = [
                {s[1:]: chance for s, chance in table.items() if s != "end" and s[:1] == piece[-1:]}  # type: ignore[misc]
                for table in tables
            ]
        text += piece
        written.append(piece)
    return written, False


def sing(
    names: Sequence[str], models: Sequence[Model], weights: Sequence[float], pieces: int, **options: object
) -> tuple[Chorus, list[bytes], bool]:
    spellers = [SPELLERS[name] for name in names]
    chorus = Chorus(spellers, weights, **options)  # type: ignore[arg-type]
    written: list[bytes] = []
    while len(written) < pieces:
        masses = [Mass(s.vocabulary, ask(chorus.text)) for s, ask in zip(spellers, models, strict=True)]
        piece = chorus.write(masses)
        # Debugging's own assertion: each strand is the text.
        for strand in chorus.strands:
            assert strand.speller.vocabulary.text_of(strand.tokens) == chorus.text
        if piece.ended:
            assert piece.text == b""
            return chorus, written, True
        written.append(piece.text)
    return chorus, written, False


def drawing(seed: int) -> Callable[[int], float]:
    return lambda index: draws.uniform(seed, draws.POLICY_STREAM, index)


@settings(max_examples=30, deadline=None)
@given(
    names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=3),
    weights=st.tuples(*[st.floats(0.05, 1.0)] * 3),
    geometric=st.booleans(),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    sharp=st.sampled_from([1.0, 4.0]),
    stop=st.sampled_from([-5.0, 5.0]),
    seed=st.integers(0, 10**6),
    options=st.sampled_from([{}, {"least": 3}, {"endless": True}]),
)
def test_it_is_the_published_loop_symbol_for_symbol(
    names: list[str],
    weights: tuple[float, ...],
    geometric: bool,
    temperature: float,
    sharp: float,
    stop: float,
    seed: int,
    options: dict[str, int],
) -> None:
    models = [model(seed + k, 1100, sharp=sharp, stop=stop) for k in range(len(names))]
    weights = weights[: len(names)]
    expected = naive(
        [SPELLERS[name].vocabulary for name in names],
        models,
        weights,
        geometric=geometric,
        temperature=temperature,
        draw=drawing(seed),
        pieces=6,
        **options,  # type: ignore[arg-type]
    )
    # The token that ends texts is one of the byte tokens here, and what only it could spell cannot be followed.
    assume(all(SPELLERS[name].vocabulary.exact(bytes([b])) for name in names for b in b"".join(expected[0])))
    _, *got = sing(
        names,
        models,
        weights,
        6,
        kind="geometric" if geometric else "mixture",
        temperature=temperature,
        draw=drawing(seed),
        min_pieces=options.get("least", 0),
        ignore_end=bool(options.get("endless")),
    )
    assert tuple(got) == expected


@pytest.mark.parametrize("kind", ["mixture", "geometric"])
def test_the_order_of_members_does_not_matter(kind: str) -> None:
    models = [model(5, 1100, sharp=3, stop=0), model(6, 1100, sharp=3, stop=0)]
    one = sing(NAMES[:2], models, [0.3, 0.7], 12, kind=kind, draw=drawing(1))
    other = sing(NAMES[1::-1], models[::-1], [0.7, 0.3], 12, kind=kind, draw=drawing(1))
    assert one[1:] == other[1:]
    assert [strand.tokens for strand in one[0].strands] == [strand.tokens for strand in reversed(other[0].strands)]


@pytest.mark.parametrize("kind", ["mixture", "geometric"])
def test_equal_members_are_that_member(kind: str) -> None:
    ask = model(7, 1100, sharp=3, stop=0)
    alone = sing(NAMES[:1], [ask], [1.0], 12, kind=kind, draw=drawing(2), temperature=0.8)
    both = sing([NAMES[0]] * 2, [ask] * 2, [0.4, 0.6], 12, kind=kind, draw=drawing(2), temperature=0.8)
    if all(not inside_character(b"".join(alone[1][: n + 1])) for n in range(len(alone[1]))):
        assert both[1:] == alone[1:]
        assert [strand.tokens for strand in both[0].strands] == [alone[0].strands[0].tokens] * 2


def test_a_member_alone_writes_the_tokens_that_it_would_sample() -> None:
    """The product of its symbols' probabilities is the token's; so are the frequencies."""
    name = "demo pair"
    vocabulary = SPELLERS[name].vocabulary
    row = model(3, 1024, sharp=2, stop=2)(b"")
    mass = Mass(vocabulary, row)
    counts: Counter[int] = Counter()
    for seed in range(6_000):
        chorus = Chorus([SPELLERS[name]], [1.0], draw=drawing(seed))
        piece = chorus.write([mass])
        if piece.ended:
            counts[STOP] += 1
        else:
            (token,) = chorus.strands[0].tokens
            assert piece.support[0] == pytest.approx(np.log(mass.at(piece.text)), abs=1e-6)
            counts[token] += 1
    tokens = [*map(int, vocabulary.order), STOP]
    chances = row[tokens].astype(np.float64)
    # Of several tokens with the same bytes the likeliest stands for all.
    assert len({vocabulary.bytes_of(token) for token in tokens}) == len(tokens)
    expected = chances / chances.sum() * 6_000
    often = expected >= 5
    seen = np.array([counts[token] for token in tokens], np.float64)
    observed = [*seen[often], seen[~often].sum()]
    assert chisquare(observed, [*expected[often], expected[~often].sum()]).pvalue > 1e-4


def test_the_most_probable_symbol_is_not_the_most_probable_token() -> None:
    vocabulary = SPELLERS["demo pair"].vocabulary
    row = np.zeros(1024, np.float32)
    for text, chance in ((b"is", 0.3), (b"a", 0.25), (b"an", 0.2), (b"at", 0.15), (b"er", 0.1)):
        row[vocabulary.exact(text)[0]] = chance
    chorus = Chorus([SPELLERS["demo pair"]], [1.0], temperature=0.0, draw=lambda _: 0.0)
    assert chorus.write([Mass(vocabulary, row)]).text == b"a"


@pytest.mark.parametrize("members", [1, 2])
def test_several_members_finish_the_character_if_any_of_them_can(members: int) -> None:
    spellers = [SPELLERS["byte-level, added tokens"], SPELLERS["demo pair"]][:members]
    rows = [np.zeros(1100, np.float32) for _ in spellers]
    for row, each in zip(rows, spellers, strict=True):
        row[each.vocabulary.exact("日".encode()[:1])[0]] = 0.9
    rows[0][spellers[0].vocabulary.exact("日本".encode())[0]] = 0.1
    chorus = Chorus(spellers, [1.0] * members, temperature=0.0, draw=lambda _: 0.0)
    piece = chorus.write([Mass(each.vocabulary, row) for each, row in zip(spellers, rows, strict=True)])
    assert piece.text == ("日".encode()[:1] if members == 1 else "日本".encode())


@pytest.mark.parametrize("chance", [1.0, 0.6])
def test_who_finds_the_piece_most_probable_goes_on_from_its_token_and_others_spell_it_anew(chance: float) -> None:
    other = SPELLERS["byte-level, added tokens"]
    spellers = [SPELLERS["demo pair"], other]
    rows = [np.zeros(1100, np.float32) for _ in spellers]
    rows[0][spellers[0].vocabulary.exact(b"e")[0]] = 1.0
    rows[1][other.vocabulary.exact(b"e")[0]] = chance
    rows[1][other.vocabulary.exact(b"x")[0]] = 1 - chance
    chorus = Chorus(spellers, [0.5, 0.5], draw=lambda _: 0.0)
    for strand in chorus.strands:
        strand.follow(b"th")
    chorus.write([Mass(each.vocabulary, row) for each, row in zip(spellers, rows, strict=True)])
    own = [*other.spell(b"th"), other.vocabulary.exact(b"e")[0]]
    assert own != other.spell(b"the")
    assert chorus.strands[1].tokens == (own if chance == 1.0 else other.spell(b"the"))


def test_a_piece_ends_within_a_character_only_if_nobody_goes_on() -> None:
    spellers = [SPELLERS[NAMES[0]], SPELLERS["demo pair"]]
    byte, whole = (np.zeros(1100, np.float32) for _ in range(2))
    e_acute = "é".encode()
    byte[spellers[0].vocabulary.exact(e_acute[:1])[0]] = 1.0
    demo = spellers[1].vocabulary
    whole[demo.exact(e_acute[:1])[0]] = 1.0
    masses = [Mass(s.vocabulary, row) for s, row in zip(spellers, (byte, whole), strict=True)]
    chorus = Chorus(spellers, [0.5, 0.5], draw=lambda _: 0.5)
    assert chorus.write(masses).text == e_acute[:1]
    assert [strand.pending for strand in chorus.strands] == [b"", b""]


def test_those_that_have_no_such_token_drop_out_until_the_next_piece() -> None:
    spellers = [SPELLERS["demo pair"], SPELLERS[NAMES[1]]]
    rows = [np.zeros(1100, np.float32) for _ in range(2)]
    first, second = (s.vocabulary for s in spellers)
    rows[0][first.exact(b"x")[0]] = 1.0
    rows[1][second.exact(b" the")[0]] = 1.0
    masses = [Mass(first, rows[0]), Mass(second, rows[1])]
    chorus = Chorus(spellers, [0.75, 0.25], draw=lambda index: 0.9 if index == 0 else 0.5)
    piece = chorus.write(masses)
    assert (piece.text, piece.support, piece.source) == (b"x", (0.0, None), 0)
    chorus = Chorus(spellers, [0.75, 0.25], draw=lambda index: 0.0 if index == 0 else 0.5)
    piece = chorus.write(masses)
    assert (piece.text, piece.support, piece.source) == (b" the", (None, 0.0), 1)
    assert chorus.strands[0].tokens == SPELLERS["demo pair"].spell(b" the")


@pytest.mark.parametrize("noise", [1e-15, -1e-15])
def test_sums_of_another_device_may_fall_where_nothing_is_added(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parallel sums are not monotone: a member that has no token for a byte then seems to have less than none."""
    monkeypatch.setattr("engine.spelling.mass._SHORT", 1)  # as in a vocabulary of many tokens
    spellers = [SPELLERS["demo pair"]] * 2
    vocabulary = spellers[0].vocabulary
    masses = []
    for text in (b"x", b"a"):
        row = np.zeros(len(vocabulary))
        row[slice(*vocabulary.places(text))] = 1.0
        sums = np.concatenate([[0.0], np.cumsum(row)])
        sums[vocabulary.span(b"x")[1] :] += noise if text == b"a" else 0.0
        masses.append(Mass.summed(vocabulary, row, sums, 0.0))
    chorus = Chorus(spellers, [0.75, 0.25], draw=lambda _: 0.5)
    piece = chorus.write(masses)
    assert (piece.text, piece.support, piece.source) == (b"x", (0.0, None), 0)


def test_a_first_byte_that_sums_are_too_coarse_for_is_heard_all_the_same() -> None:
    """Beside a sum near one 1e-20 is nothing; yet of those tokens the member knows which it means."""
    vocabulary = SPELLERS["demo pair"].vocabulary
    rows = [np.zeros(1024, np.float32) for _ in range(2)]
    rows[0][vocabulary.exact(b"a")[0]] = 1.0
    for text, chance in ((b"x", 0.5), (b"xml", 0.5)):
        for token in vocabulary.exact(text):
            rows[1][token] = chance
    faint = vocabulary.exact(b"x")[0]
    rows[0][faint] = 1e-20
    chorus = Chorus([SPELLERS["demo pair"]] * 2, [0.25, 0.75], draw=lambda _: 0.9)
    piece = chorus.write([Mass(vocabulary, row) for row in rows])
    assert piece.text == b"x"
    assert piece.support[0] == pytest.approx(np.log(1e-20))


def test_ties_go_to_the_lowest_symbol_and_nothing_impossible_is_drawn() -> None:
    row = np.zeros(258)
    row[[7, 9, END]] = [0.4, 0.4, 0.2]
    assert choose(row, 0.0, 0.3) == 7
    assert choose(row, 1.0, 0.0) == 7
    assert choose(row, 1.0, np.nextafter(1.0, 0.0)) == END
    row[END] = 0.0
    assert choose(row, 1.0, np.nextafter(1.0, 0.0)) == 9
    assert [choose(row, 1e-3, u) for u in (0.1, 0.6)] == [7, 9]


@given(text=st.text(min_size=1, max_size=3), cut=st.integers(0, 3))
def test_within_a_character(text: str, cut: int) -> None:
    data = text.encode()
    data = data[: len(data) - cut]
    try:
        data.decode()
    except UnicodeDecodeError:
        assert inside_character(data)
    else:
        assert not inside_character(data)
