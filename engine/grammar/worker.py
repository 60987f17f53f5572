"""The process in which forms are read: ``python -m engine.grammar.worker``, started by :mod:`engine.grammar.checker`.

Frames on standard input and output: four bytes of length, then msgpack. Whatever a form costs is paid here: beyond its
memory this process fails to allocate, beyond its processor time the operating system ends it.
"""

from __future__ import annotations

import os
import resource
import signal
import struct
import sys
import time
from typing import IO, TYPE_CHECKING

import msgspec

from engine.grammar.errors import FormError
from engine.grammar.forms import grammar_of
from engine.types import StructuredOutputs

if TYPE_CHECKING:
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
    """Bounds that the back end itself keeps at every step: some milliseconds, and 50 MB of lexer states."""
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=50_000, verbose_errors=False)


def examine(form: StructuredOutputs, setup: Setup, tokenizer: LLTokenizer, limits: LLParserLimits) -> Verdict:
    """Read a form, compile it, and see that an answer can begin."""
    from llguidance import LLMatcher

    try:
        grammar = grammar_of(form, any_whitespace=setup.any_whitespace)
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            return Verdict(problem=_plain(matcher.get_error()))
    except FormError as error:
        return Verdict(problem=_one_line(str(error)))
    except RecursionError:
        return Verdict(problem="the form is nested too deeply")
    except MemoryError:
        return Verdict(problem="the form takes too much memory")
    except ValueError as error:
        return Verdict(problem=_plain(str(error)))
    return Verdict(grammar=grammar)


def _plain(error: str) -> str:
    """The back end's words without its inside."""
    first = error.strip().splitlines()[0] if error.strip() else "cannot be compiled"
    if first.startswith("Unsatisfiable") or first.startswith("NoExtension"):
        return "nothing satisfies the form"
    if first.startswith("panic"):
        return "the form is too large for the back end"
    return _one_line(first)


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
