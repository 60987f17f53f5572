"""What a base and experts of other vocabularies must write, by brute force over the toy tokenizers.

One request, one plain loop, all tokens of all members anew at every position. Written from docs/strategies.md; shares
nothing with the engine but the stand-ins' draws.
"""

from __future__ import annotations

from bench.standin import next_token, top_probability
from engine.types import BASE, GenerationRequest, Look, WrittenWord
from tests.engine import toys
from tests.engine.oracle import Pair, Written, look, refused

Piece = tuple[bytes, dict[int, list[int]]]
"""Something that was written, and the tokens in which a lane wrote it itself."""

BYTES = {"Ġ": b" ", "Ċ": b"\n", "Ã": b"\xc3", "©": b"\xa9"}
MOST = 64


def bytes_of(lane: int, token: int) -> bytes | None:
    """None for special tokens."""
    name = toys.tokenizer(lane).id_to_token(token)
    if name is None or name in (toys.END, toys.MARK):
        return None
    return b"".join(BYTES.get(char, char.encode()) for char in name)


def spell(lane: int, text: bytes) -> list[int]:
    """Characters by the tokenizer, bytes that are none by themselves."""
    tokens: list[int] = []
    run = ""
    for char in [*text.decode("utf-8", "surrogateescape"), ""]:
        if char and not "\udc80" <= char <= "\udcff":
            run += char
            continue
        tokens += toys.tokenizer(lane).encode(run, add_special_tokens=False).ids
        run = ""
        if char:
            name = {0xC3: "Ã", 0xA9: "©"}[ord(char) - 0xDC00]
            tokens.append(toys.tokenizer(lane).token_to_id(name))
    assert b"".join(bytes_of(lane, token) or b"" for token in tokens) == text
    return tokens


def safe(lane: int, text: bytes, at: int) -> bool:
    """Whether a text is spelled apart at an offset, whatever stands around."""
    before, after = text[at - 1 : at], text[at : at + 1]
    if not before or not after:
        return False
    if after == b" ":
        return before not in b" \n"
    if after == b".":
        # A token of the last lane's lies across.
        return before.isalpha() and lane != 2
    return before.isalpha() and after == b"\n"


def begins(lane: int, text: bytes, upcoming: bytes) -> bool:
    """Whether ``upcoming`` begins a word behind ``text``."""
    if not text or not upcoming or safe(lane, text + upcoming, len(text)):
        return True
    return text.endswith(b"\n") and upcoming[:1] not in b" \n"


def ends_of(lane: int, tokens: list[int]) -> list[int]:
    ends, end = [], 0
    for token in tokens:
        end += len(bytes_of(lane, token) or b"")
        ends.append(end)
    return ends


def last_safe(lane: int, tokens: list[int], text: bytes, most: int) -> int:
    """The last offset up to ``most`` at which the text is spelled apart and a token of the lane's ends; else 0."""
    ends = ends_of(lane, tokens)
    return max((at for at in range(1, most + 1) if at in ends and safe(lane, text, at)), default=0)


def strand(lane: int, pieces: list[Piece]) -> list[int]:
    """A lane's own tokens for a text: its own stay, the others' are spelled from the last safe offset on."""
    tokens: list[int] = []
    text = foreign = b""

    def respell() -> None:
        at = last_safe(lane, tokens, text + foreign, len(text))
        count = sum(end <= at for end in ends_of(lane, tokens))
        tokens[count:] = spell(lane, (text + foreign)[at:])

    for piece, own in pieces:
        if lane not in own:
            foreign += piece
            continue
        if foreign:
            respell()
            text, foreign = text + foreign, b""
        tokens += own[lane]
        text += piece
    if foreign:
        respell()
    return tokens


def aligned(lane: int, pieces: list[Piece], upcoming: bytes) -> bool:
    """Whether an expert may be asked at the end of the text: a word of its own ends there, or one begins for both."""
    text = b"".join(piece for piece, _ in pieces)
    if text.endswith(b"\xc3"):
        return False
    if pieces and lane in pieces[-1][1]:
        return True  # its own word ends there
    if not begins(BASE, text, upcoming):
        return False
    at = last_safe(lane, strand(lane, pieces), text + upcoming, len(text))
    return at == len(text) or len(text) in [at + end for end in ends_of(lane, spell(lane, (text + upcoming)[at:]))]


def word_of(
    lane: int, prompt: list[int], pieces: list[Piece], context: int
) -> tuple[bytes, list[int], bool, list[float]]:
    """What an expert writes behind a text: its bytes, its tokens, whether it would end the text instead, and how sure
    it is of each of them.
    """
    text = b"".join(piece for piece, _ in pieces)
    word, own, before = b"", [], [*prompt, *strand(lane, pieces)]
    sure: list[float] = []
    while len(before) + len(own) < context:
        token = next_token(lane, [*before, *own], toys.size(lane))
        part = bytes_of(lane, token)
        confidence = top_probability(lane, [*before, *own])
        if part is None:
            ended = token == toys.end(lane) and not own
            return word, own, ended, [confidence] if ended else sure
        too_long = len(word) + len(part) > MOST and not word.endswith(b"\xc3")
        line_ends = part.startswith(b"\n") and word[-1:] not in (b" ", b"\n")
        if word and (too_long or line_ends or begins(lane, text + word, part)):
            break
        word, own, sure = word + part, [*own, token], [*sure, confidence]
    return word, own, False, sure


def complete(request: GenerationRequest, pair: Pair) -> Written:
    """The request, written to its end."""
    whole = Written()
    if refused(request, pair):
        whole.finish_reason = "error"
        return whole
    sampling, collaboration = request.sampling, request.collaboration
    prompts = dict(collaboration.prompts)
    longest = max(map(len, (request.prompt, *prompts.values())))
    most = min(sampling.max_tokens, pair.max_model_len - longest)
    limit = collaboration.max_expert_tokens
    pieces: list[Piece] = []
    # What a lane was told last, its prompt apart.
    told: dict[int, list[int]] = {}

    def tellable(lane: int) -> bool:
        # A lane is cut only together with growing. Where tokens stay, the last of them is told anew; where none do,
        # after a veto inside the text's first word, it is not asked before there are others.
        return bool(strand(lane, pieces)) or not told.get(lane)

    def ends(token: int, length: int) -> bool:
        stops = token in sampling.stop_token_ids or (token in pair.eos and not sampling.ignore_eos)
        return stops and length >= sampling.min_tokens

    while whole.finish_reason is None:
        prefix = [*request.prompt, *whole.tokens]
        expert_tokens = sum(source != BASE for source in whole.sources)
        own = next_token(BASE, prefix, toys.size(BASE))
        upcoming = bytes_of(BASE, own) or b""
        writer, deferral = look(request, pair, prefix, expert_tokens)
        tokens, logprob, piece = [own], None, (upcoming, {BASE: [own]})
        seen = Look(top_probability(BASE, prefix))
        prompt = prompts.get(writer, request.prompt)
        room = writer != BASE and len(prompt) + len(strand(writer, pieces)) < pair.max_model_len
        if room and tellable(writer) and aligned(writer, pieces, upcoming):
            word, said, ended, sure = word_of(writer, prompt, pieces, pair.max_model_len)
            seen = Look(seen.base, min(sure, default=None))
            doubts = [value for value in sure if value < (collaboration.veto or 0.0)]
            if doubts:
                # The expert is not asked any further.
                seen = Look(seen.base, doubts[0])
                whole.vetoed.append(len(whole.tokens))
                told[writer] = [*strand(writer, pieces), *said[: sure.index(doubts[0])]]
                writer = BASE
            elif said:
                tokens = spell(BASE, word)[: None if limit is None else limit - expert_tokens]
                tokens = tokens[: most - len(whole.tokens)]
                stops = [n for n, token in enumerate(tokens, 1) if ends(token, len(whole.tokens) + n)]
                tokens = tokens[: min(stops, default=None)]
                logprob, piece = -0.5 * len(said), (word, {writer: said})
            elif ended and not sampling.ignore_eos and len(whole.tokens) + 1 >= sampling.min_tokens:
                tokens, logprob, piece = [pair.eos[0]], -0.5, (b"", {})
            else:
                writer = BASE
        else:
            writer = BASE
        pieces.append(piece)
        if writer != BASE:
            seen = Look(seen.base, seen.expert, tokens[0] == own)
        if collaboration.looks:
            whole.looks += [seen, *[Look(None, seen.expert)] * (len(tokens) - 1)]
        if logprob is not None:
            whole.words.append(WrittenWord(len(whole.tokens), len(tokens), writer, logprob))
        whole.tokens += tokens
        whole.sources += [writer] * len(tokens)
        whole.deferrals += [deferral, *[None] * (len(tokens) - 1)]
        if ends(whole.tokens[-1], len(whole.tokens)):
            whole.finish_reason, whole.stop_token = "stop", whole.tokens[-1]
        elif len(whole.tokens) == most:
            whole.finish_reason = "length"
    return whole
