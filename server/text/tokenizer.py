"""The tokenizer of the served pair: the tokenizers library's own ``tokenizer.json``, off the event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer

from engine.checkpoints import locate, tokenizer_folder
from engine.errors import CheckpointError
from engine.spelling.decoding import Decoding, decoding_of, token_bytes
from engine.spelling.guard import SpecialTokenGuard
from server.text.detokenize import CONTEXT, Detokenizer, TableDetokenizer, WindowDetokenizer

_ROUGHLY = Decoding(spell=lambda text: text.replace("▁", " "), byte_fallback=True)
"""How tokens are shown one by one where the decoder does not treat them so."""

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
        self._decoding = decoding_of(tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        self._added = frozenset(added)
        self._special = frozenset(token for token, entry in added.items() if entry.special)
        # Bounded by the vocabulary, filled as tokens are met.
        self._bytes = lru_cache(maxsize=None)(self._compute_bytes)
        self._shown = lru_cache(maxsize=None)(lambda token: b"" if token in self._special else self._bytes(token))
        self.longest_token = max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=1)
        """Most characters that one token can stand for."""
        self.config = config or {}
        self.folder = folder

    @classmethod
    def load(cls, location: str, threads: int = 2, *, setting: str = "tokenizer") -> TextTokenizer:
        """Load from a folder, from a ``tokenizer.json``, or from a name on a hub.

        Args:
            setting: that gives the location, for messages.

        Raises:
            TokenizerError: nothing usable is there.
        """
        path = Path(location).expanduser()
        if not path.exists():
            try:
                path = locate(location)
            except CheckpointError as error:
                raise TokenizerError(f"{setting}: {error}") from None
        if path.is_dir():
            try:
                # Converted if need be: the same one that the engine reads.
                folder = tokenizer_folder(path)
            except CheckpointError as error:
                raise TokenizerError(f"{setting}: {error}") from None
            file = folder / "tokenizer.json"
        else:
            folder, file = path.parent, path
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

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence; unknown ids are nothing."""
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return "".join(map(detokenizer.push, tokens)) + detokenizer.flush()

    def detokenizer(self, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True) -> Detokenizer:
        """A detokenizer for what follows a prompt."""
        shown = self._shown if skip_special_tokens else self._bytes
        before = [token for token in prompt[-CONTEXT:] if shown(token)]
        if self._decoding is None:
            return WindowDetokenizer(lambda tokens: self._decode(tokens, skip_special_tokens), before)
        return TableDetokenizer(
            self._decoding,
            shown,
            lambda token: self._compute_bytes(token, first=True),
            before,
            begun=len(prompt) > CONTEXT,
        )

    def guard(self, chat_template: str) -> SpecialTokenGuard:
        """What keeps special tokens out of messages; see :mod:`engine.spelling.guard`."""
        return SpecialTokenGuard(self._tokenizer, chat_template)

    def is_special(self, token: int) -> bool:
        """Whether detokenising skips it."""
        return token in self._special

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for, special tokens included; b"" for an unknown id."""
        if token in self._special:
            return self._content(token).encode("utf-8", "replace")
        return self._bytes(token)

    def token_text(self, token: int) -> str:
        r"""How a single token is shown in logprobs: its text, or ``bytes:\xe2\x80`` where it is part of a character."""
        data = self.token_bytes(token)
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

    def _decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text

    def _content(self, token: int) -> str:
        content: str | None = self._tokenizer.id_to_token(token)
        return content or ""

    def _compute_bytes(self, token: int, *, first: bool = False) -> bytes:
        content = self._content(token)
        if not content:
            return b""
        decoding = self._decoding or _ROUGHLY
        return token_bytes(decoding, content, added=token in self._added, first=first)
