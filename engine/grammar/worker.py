"""The process in which forms are read: ``python -m engine.grammar.worker``, started by :mod:`engine.grammar.checker`.

Frames on standard input and output: four bytes of length, then msgpack. Whatever a form costs is paid here: beyond its
memory this process fails to allocate, beyond its processor time the operating system ends it.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import struct
import sys
import time
from typing import IO, TYPE_CHECKING

import msgspec

from engine.grammar.errors import FormError
from engine.grammar.forms import grammar_of, json_grammar, parsed
from engine.grammar.schema import MAX_OPTIONAL_PROPERTIES, Schema, normalised
from engine.types import StructuredOutputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from llguidance import LLParserLimits, LLTokenizer

LENGTH = struct.Struct(">I")


class Setup(msgspec.Struct, frozen=True):
    """What a worker must know before its first form.

    Attributes:
        tokenizer: the content of a tokenizer.json.
        memory: bytes that the process may take beyond what it has when it is ready.
    """

    tokenizer: str
    vocab_size: int
    end: int | None
    any_whitespace: bool
    seconds: int
    memory: int


class Verdict(msgspec.Struct, frozen=True):
    """One is set: the grammar in the back end's notation, or what is wrong with the form."""

    grammar: str | None = None
    problem: str | None = None


def read_frame(stream: IO[bytes]) -> bytes | None:
    """The next frame; None at the end."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    size = LENGTH.unpack(head)[0]
    body = stream.read(size)
    return body if len(body) == size else None


def write_frame(stream: IO[bytes], body: bytes) -> None:
    """Send one frame."""
    stream.write(LENGTH.pack(len(body)) + body)
    stream.flush()


def tokenizer_of(setup: Setup) -> LLTokenizer:
    """The back end's tokenizer."""
    from llguidance import LLTokenizer

    return LLTokenizer(setup.tokenizer, n_vocab=setup.vocab_size, eos_token=setup.end)


def parser_limits() -> LLParserLimits:
    """Bounds that the back end itself keeps at every step: some milliseconds, and 50 MB of lexer states.

    Every optional property that may come next takes four items of a row.
    """
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=50_000, max_items_in_row=6 * MAX_OPTIONAL_PROPERTIES, verbose_errors=False)


def examine(form: StructuredOutputs, setup: Setup, tokenizer: LLTokenizer, limits: LLParserLimits) -> Verdict:
    """Read a form, compile it, and see that an answer can begin."""
    from llguidance import LLMatcher

    def complaint(grammar: str) -> str | None:
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()
        return str(matcher.get_error()) if matcher.is_error() else None

    try:
        grammar = grammar_of(form, any_whitespace=setup.any_whitespace)
        error = complaint(grammar)
        if error is None:
            return Verdict(grammar=grammar)
        if error.startswith(_UNDECIDED) and form.json is not None:
            return Verdict(problem=_one_line(_undecided(form.json, complaint)))
        return Verdict(problem=_plain(error, form))
    except FormError as error:
        return Verdict(problem=_one_line(str(error)))
    except (RecursionError, MemoryError) as error:
        return Verdict(problem=_TOO_MUCH[type(error)])
    except (ValueError, OverflowError) as error:
        return Verdict(problem=_plain(str(error), form))


_TOO_MUCH = {RecursionError: "the form is nested too deeply", MemoryError: "the form takes too much memory"}
_UNDECIDED = "Unable to determine if regex is empty"
_LARK = re.compile(r"(?:at )?(\d+)\((\d+)\): (.*)")


def _undecided(schema: str, complaint: Callable[[str], str | None]) -> str:
    """The part of a schema of which the back end cannot say whether anything satisfies it."""
    strings: list[tuple[str, Schema]] = []
    normalised(parsed(schema), strings)
    for path, part in strings:
        if (complaint(json_grammar(part, any_whitespace=True)) or "").startswith(_UNDECIDED):
            return f"the pattern, format or lengths at {path} are too complex together"
    return "a string's pattern, format or lengths are too complex together"


def _plain(error: str, form: StructuredOutputs) -> str:
    """What the back end says, in words that are no secret of its own; its own go to the log."""
    lines = error.strip().splitlines() or [""]
    if lines[0].startswith(("Unsatisfiable", "NoExtension")):
        return "nothing satisfies the form"
    if lines[0].startswith(("panic", "grammar size", "parser error: Too many items")):
        return "the form is too large for the back end"
    if form.grammar is not None and (place := _LARK.match(lines[0])):
        # A user's own Lark grammar. A regular expression's error is shown in several lines, its reason last.
        reason = place[3].partition(" (in regex)")[0]
        why = next((line.removeprefix("error: ") for line in lines[1:] if line.startswith("error: ")), None)
        return _one_line(
            f"the grammar cannot be read in line {place[1]}, column {place[2]}: {reason}{f': {why}' if why else ''}"
        )
    print(f"a form cannot be compiled: {_one_line(error)}", file=sys.stderr, flush=True)
    return "the form cannot be compiled"


def _one_line(text: str) -> str:
    safe = "".join(char if char.isprintable() else "?" for char in text[:300])
    return safe + ("..." if len(text) > 300 else "")


def main() -> None:
    """Serve until the other side is gone."""
    # Nothing but frames may come out; whatever prints, prints to the log.
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    first = read_frame(sys.stdin.buffer)
    if first is None:
        return
    setup = msgspec.msgpack.decode(first, type=Setup)
    tokenizer, limits = tokenizer_of(setup), parser_limits()
    examine(StructuredOutputs(json="{}"), setup, tokenizer, limits)
    with open("/proc/self/statm", encoding="ascii") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + setup.memory, taken + setup.memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    write_frame(output, msgspec.msgpack.encode(Verdict()))
    while (body := read_frame(sys.stdin.buffer)) is not None:
        used = time.process_time()
        # Whole seconds are what the system counts in.
        resource.setrlimit(resource.RLIMIT_CPU, (int(used) + setup.seconds + 1, resource.RLIM_INFINITY))
        form = msgspec.msgpack.decode(body, type=StructuredOutputs)
        write_frame(output, msgspec.msgpack.encode(examine(form, setup, tokenizer, limits)))


if __name__ == "__main__":
    main()
