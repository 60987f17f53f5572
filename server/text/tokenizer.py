"""The tokenizer of the served pair: the tokenizers library's own ``tokenizer.json``, off the event loop."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer, decoders

from server.text.detokenize import ByteDetokenizer, Detokenizer, StreamDetokenizer

_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


T = TypeVar("T")


class TokenizerError(Exception):
    """The tokenizer cannot be loaded. The message is one line."""


class TextTokenizer:
    """Text to token ids and back.

    Args:
        tokenizer: as loaded from ``tokenizer.json``. Truncation and padding that the file may ask for are switched
            off: a prompt is never cut silently.
        config: content of ``tokenizer_config.json``; may be empty.
        folder: where it was loaded from, for files beside it; None if there is no folder.
        threads: tokenising threads. One more does what is not to hold up prompts.
    """

    def __init__(
        self, tokenizer: Tokenizer, config: dict[str, Any] | None = None, folder: Path | None = None, threads: int = 2
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tokenize")
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="tokenize-aside")
        self._byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._special = frozenset(
            token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special
        )
        self._added = frozenset(tokenizer.get_added_tokens_decoder())
        # Bounded by the vocabulary, filled as tokens are met.
        self._bytes = lru_cache(maxsize=None)(self._compute_bytes)
        self._shown = lru_cache(maxsize=None)(lambda token: b"" if token in self._special else self._bytes(token))
        self.longest_token = max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=1)
        """Most characters that one token can stand for."""
        self.config = config or {}
        self.folder = folder

    @classmethod
    def load(cls, location: str, threads: int = 2) -> TextTokenizer:
        """Load from a folder, from a ``tokenizer.json``, or from a name on a hub.

        Raises:
            TokenizerError: nothing usable is there.
        """
        path = Path(location).expanduser()
        if not path.exists():
            path = _from_hub(location)
        folder, file = (path, path / "tokenizer.json") if path.is_dir() else (path.parent, path)
        if not file.is_file():
            raise TokenizerError(f"tokenizer: {folder} has no tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:
            raise TokenizerError(f"tokenizer: {file} is damaged: {str(error)[:200]}") from None
        config_file = folder / "tokenizer_config.json"
        config: Any = {}
        if config_file.is_file():
            try:
                config = json.loads(config_file.read_text("utf-8"))
            except ValueError as error:
                raise TokenizerError(f"tokenizer: {config_file} is damaged: {str(error)[:200]}") from None
        if not isinstance(config, dict):
            raise TokenizerError(f"tokenizer: {config_file} is not an object")
        return cls(tokenizer, config, folder, threads)

    @property
    def vocab_size(self) -> int:
        """Tokens that the tokenizer knows, added ones included; the model's vocabulary may be padded beyond it."""
        size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        return size

    async def run(self, work: Callable[[], T], *, aside: bool = False) -> T:
        """Have something done in a thread: one of those that tokenise prompts, or the one beside them."""
        return await asyncio.get_running_loop().run_in_executor(self._aside if aside else self._pool, work)

    async def encode(self, text: str, *, add_special_tokens: bool = True, aside: bool = False) -> list[int]:
        """Token ids of a text, computed in a thread; see :meth:`run`."""
        return await self.run(lambda: self._encode(text, add_special_tokens), aside=aside)

    async def encode_all(self, texts: list[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of several texts, in order."""
        return list(await asyncio.gather(*(self.encode(t, add_special_tokens=add_special_tokens) for t in texts)))

    def decode(self, tokens: list[int]) -> str:
        """Text of a whole sequence; special tokens are skipped, unknown ids are nothing."""
        # As for encoding: only the batch's variant releases the GIL.
        (text,) = self._tokenizer.decode_batch([tokens], skip_special_tokens=True)
        return str(text)

    def detokenizer(self) -> Detokenizer:
        """A detokenizer for one sequence."""
        if self._byte_level:
            return ByteDetokenizer(self._shown)
        return StreamDetokenizer(self._tokenizer)

    def is_special(self, token: int) -> bool:
        """Whether detokenising skips it."""
        return token in self._special

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for, special tokens included; b"" for an unknown id."""
        return self._bytes(token)

    def token_text(self, token: int) -> str:
        r"""How a single token is shown in logprobs: its text, or ``bytes:\xe2\x80`` where it is part of a character."""
        data = self._bytes(token)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def close(self) -> None:
        """Ends the threads."""
        for pool in (self._pool, self._aside):
            pool.shutdown(wait=False, cancel_futures=True)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # Of the library's ways to encode, only those for batches release the GIL (tried with tokenizers 0.23).
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def _compute_bytes(self, token: int) -> bytes:
        content: str | None = self._tokenizer.id_to_token(token)
        if content is None:
            return b""
        if token in self._added:
            return content.encode("utf-8")
        if self._byte_level:
            table = _byte_table()
            # A piece outside of the byte alphabet is shown as it stands; the library's decoder does the same.
            return bytes(table[char] for char in content) if all(c in table for c in content) else content.encode()
        if fallback := _BYTE_FALLBACK.fullmatch(content):
            return bytes([int(fallback[1], 16)])
        return content.replace("▁", " ").encode("utf-8")


@lru_cache(maxsize=1)
def _byte_table() -> dict[str, int]:
    """The alphabet of byte-level vocabularies: printable Latin-1 characters stand for their own byte, the other bytes
    for the characters from U+0100 on, in order.
    """
    table: dict[str, int] = {}
    shifted = 0
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or (0xA1 <= byte <= 0xFF and byte != 0xAD):
            table[chr(byte)] = byte
        else:
            table[chr(0x100 + shifted)] = byte
            shifted += 1
    return table


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except Exception as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise TokenizerError(f"tokenizer: {name!r} is neither a folder nor to be had from a hub: {reason}") from None
