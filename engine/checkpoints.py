"""What is read of a checkpoint before, or instead of, loading its weights. For engine, training and conversion alike.

A :class:`Checkpoint` reads each thing when it is first asked for: ``config.json``, the LM head's shape, the
vocabulary, the ends of text, and the identity that a gate artifact records.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from engine.errors import CheckpointError
from engine.spelling.speller import Speller
from engine.spelling.vocabulary import Vocabulary as ByteVocabulary
from engine.spelling.vocabulary import VocabularyError, obstacle
from engine.vocabulary import Vocabulary

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
WEIGHTS = "model.safetensors"

GATE_IN_HEAD = "collm_gate_in_lm_head"
"""Key of a config.json that says: the last row of the LM head is the gate's theta (the reference format)."""

SLOW_TOKENIZERS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")
"""Files of tokenizers without a tokenizer.json that transformers converts."""

# Keys of a config.json that say how a model is run or where it came from, not what it computes.
_NOT_ARCHITECTURE = {
    "architectures", "attention_dropout", "auto_map", "bos_token_id", "dtype", "eos_token_id", "initializer_range",
    "pad_token_id", "quantization_config", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
# The longest context, and the rows of embedding and LM head: the vocabulary is compared for itself.
_NOT_COMPARED = {"max_position_embeddings", "vocab_size"}


ConfigReader = Callable[[Path, Mapping[str, Any]], Any]
"""Reads a folder's config.json, with some keys overridden, into an object as transformers has it."""


class Checkpoint:
    """A checkpoint in a folder. Attributes are read when first used and raise :class:`CheckpointError`.

    Args:
        directory: with config.json.
        tokenizer_directory: with the tokenizer's files, where that is another folder.
        overrides: keys of config.json that are to be taken as these.
        read_config: for a config.json that is nested, or has a family's own names or defaults. Default: transformers.
    """

    def __init__(
        self,
        directory: str | Path,
        tokenizer_directory: str | Path | None = None,
        overrides: Mapping[str, Any] | None = None,
        read_config: ConfigReader | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.tokenizer_directory = self.directory if tokenizer_directory is None else Path(tokenizer_directory)
        self._overrides = dict(overrides or {})
        self._read_config = read_config or read_with_transformers

    @classmethod
    def find(
        cls, model: str, options: Mapping[str, Any] | None = None, read_config: ConfigReader | None = None
    ) -> Checkpoint:
        """A checkpoint by folder or by its name on a hub, as vLLM finds it with these engine options.

        Args:
            model: folder, or name on a hub.
            options: vLLM's engine options; ``revision``, ``tokenizer``, ``tokenizer_revision``, ``hf_config_path`` and
                ``hf_overrides`` count here.

        Raises:
            CheckpointError: nothing is there.
        """
        options = options or {}
        revision = options.get("revision")
        directory = locate(options.get("hf_config_path") or model, revision)
        tokenizer_revision = options.get("tokenizer_revision") or revision
        tokenizer = options.get("tokenizer")
        if tokenizer is None:
            own = Path(model)
            tokenizer_directory = own if own.is_dir() else locate(model, tokenizer_revision)
        else:
            tokenizer_directory = locate(tokenizer, options.get("tokenizer_revision"))
        overrides = options.get("hf_overrides")
        return cls(directory, tokenizer_directory, overrides if isinstance(overrides, dict) else None, read_config)

    def with_tokenizer(self, directory: Path) -> Checkpoint:
        """The same model with the tokenizer of another folder."""
        return Checkpoint(self.directory, directory, self._overrides, self._read_config)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return read_json(self.directory / CONFIG) | self._overrides

    @cached_property
    def _shape(self) -> tuple[int, int]:
        text: Any = self.config
        if not all(isinstance(self.config.get(key), int) for key in ("vocab_size", "hidden_size")):
            # Nested, under a family's own names, or left to the family's defaults.
            text = _text_config(self.directory, self._overrides, self._read_config)
        try:
            width = text.get("word_embed_proj_dim") or text["hidden_size"]
            return int(text["vocab_size"]), int(width)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.directory / CONFIG} has no usable {error}") from error

    @property
    def depth(self) -> int | None:
        """Layers; None where config.json does not say so in a common word."""
        nested = self.config.get("text_config")
        for fields in (self.config, nested if isinstance(nested, dict) else {}):
            for key in ("num_hidden_layers", "n_layer"):
                if isinstance(fields.get(key), int):
                    return int(fields[key])
        return None

    @property
    def rows(self) -> int:
        """Outputs of the LM head, padding included."""
        return self._shape[0]

    @property
    def head_width(self) -> int:
        """Width of the LM head's input, which is what a gate reads. Usually the hidden size; OPT may project it."""
        return self._shape[1]

    @property
    def gate_in_head(self) -> bool:
        """Whether the checkpoint says that it is in the reference format."""
        return self.config.get(GATE_IN_HEAD) is True

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer's."""
        return read_vocabulary(tokenizer_folder(self.tokenizer_directory))

    @cached_property
    def speller(self) -> Speller:
        """Spells text in the model's tokens, for texts that models with other vocabularies write too.

        Raises:
            CheckpointError: its tokens are no byte strings, or cannot spell every text.
        """
        return self.speller_ending_with(self.ends)

    def speller_ending_with(self, ends: Sequence[int]) -> Speller:
        """The same where other ids end a text too.

        Raises:
            CheckpointError: as for ``speller``.
        """
        file = tokenizer_folder(self.tokenizer_directory) / TOKENIZER
        try:
            tokenizer = Tokenizer.from_file(str(file))
            vocabulary = ByteVocabulary(tokenizer, ends, size=self.rows)
        except VocabularyError as error:
            raise CheckpointError(f"{file}: {error}") from error
        except Exception as error:  # the library raises nothing more precise for a file that it cannot read
            raise CheckpointError(f"{file}: is damaged: {str(error)[:200]}") from error
        if (reason := obstacle(vocabulary)) is not None:
            raise CheckpointError(f"{file}: {reason}")
        return Speller(tokenizer, vocabulary)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Ids that end a text: of generation_config.json, else of config.json; then the tokenizer's own."""
        found: list[Any] = []
        file = self.directory / GENERATION_CONFIG
        ids = read_json(file).get("eos_token_id") if file.is_file() else None
        if ids is None:
            nested = self.config.get("text_config")
            ids = self.config.get("eos_token_id", (nested or {}).get("eos_token_id"))
        found += ids if isinstance(ids, list) else [ids]
        file = self.tokenizer_directory / TOKENIZER_CONFIG
        token = read_json(file).get("eos_token") if file.is_file() else None
        if isinstance(token, dict):
            token = token.get("content")
        found.append(self.vocabulary.ids.get(token) if isinstance(token, str) else None)
        return tuple(dict.fromkeys(end for end in found if isinstance(end, int) and end >= 0))

    @property
    def identity(self) -> ModelIdentity:
        """What a gate artifact records of it."""
        architecture = {
            key: value for key, value in self.config.items() if key not in _NOT_ARCHITECTURE and not key.startswith("_")
        }
        text = json.dumps(architecture, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        vocabulary = self.vocabulary
        return ModelIdentity(
            config_sha256=hashlib.sha256(text.encode()).hexdigest(),
            tokenizer_sha256=vocabulary.sha256,
            architecture=architecture,
            tokens=len(vocabulary),
            text_sha256=vocabulary.text_sha256,
        )


class ModelIdentity(msgspec.Struct, frozen=True):
    """What a gate needs a model to be, whatever its weights' values and precision.

    Attributes:
        config_sha256: of ``architecture``.
        tokenizer_sha256: of the vocabulary, the sorted map from token to id.
        architecture: the part of config.json that decides what is computed.
        tokens: entries of the vocabulary.
        text_sha256: of its ordinary text tokens alone; None in artifacts from before it was recorded.
    """

    config_sha256: str
    tokenizer_sha256: str
    architecture: dict[str, Any]
    tokens: int
    text_sha256: str | None = None

    def differences(self, other: ModelIdentity, *, vocabulary_only: bool = False) -> list[str]:
        """What ``other`` has instead, one phrase for each difference; empty if they agree.

        Keys of config.json that only one of the two has are none: each version of transformers writes its own set.

        Args:
            vocabulary_only: of an expert nothing else matters to a gate, which reads the base alone.
        """
        found = [] if vocabulary_only else _unequal(self.architecture, other.architecture, "")
        same_text = self.text_sha256 is not None and self.text_sha256 == other.text_sha256
        if self.tokenizer_sha256 != other.tokenizer_sha256 and not same_text:
            hashes = f"tokenizer.json has sha256 {other.tokenizer_sha256[:12]}, not {self.tokenizer_sha256[:12]}"
            found.append(f"{hashes} ({other.tokens} tokens, not {self.tokens})")
        return found


def model_identity(path: str | Path) -> ModelIdentity:
    """The identity of the checkpoint in directory ``path``.

    Raises:
        CheckpointError: config.json or tokenizer.json is missing or is not what it should be.
    """
    return Checkpoint(path).identity


def _unequal(mine: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str) -> list[str]:
    found: list[str] = []
    for key in sorted((mine.keys() & theirs.keys()) - _NOT_ARCHITECTURE - _NOT_COMPARED):
        if isinstance(mine[key], dict) and isinstance(theirs[key], dict):
            found += _unequal(mine[key], theirs[key], f"{prefix}{key}.")
        elif mine[key] != theirs[key]:
            found.append(f"config.json {prefix}{key} is {theirs[key]}, not {mine[key]}")
    return found


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: naming the file.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds no JSON object")
    return content


def read_vocabulary(directory: Path) -> Vocabulary:
    """The vocabulary in a folder's tokenizer.json, of any of the tokenizers library's models.

    Raises:
        CheckpointError: naming the file.
    """
    file = directory / TOKENIZER
    content = read_json(file)
    try:
        entries = content["model"]["vocab"]
        if isinstance(entries, dict):
            ids = dict(entries)
        else:
            ids = {token: number for number, (token, _score) in enumerate(entries)}
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: field model.vocab: no vocabulary is found there") from error
    return Vocabulary(ids | added, frozenset(added))


def locate(name: str | Path, revision: str | None = None, *, also: Sequence[str] = ()) -> Path:
    """The folder of a checkpoint or tokenizer; a name on a hub is fetched, all but its weights.

    Args:
        also: files to be fetched beside.

    Raises:
        CheckpointError: it is neither.
    """
    path = Path(name)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.json", "*.jinja", "*.txt", "*.model", *also]
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise CheckpointError(f"{name}: no such folder") from error
    except Exception as error:  # network and cache failures of many kinds; all mean the same here
        raise CheckpointError(
            f"{name}: no such folder, and it could not be downloaded from a model hub ({type(error).__name__})"
        ) from error


def tokenizer_folder(directory: Path) -> Path:
    """The folder to read a tokenizer from: the given one if it has a tokenizer.json, else one with its conversion.

    SentencePiece models and pairs of vocabulary and merges are converted by transformers, once: the result is kept in
    ``$XDG_CACHE_HOME/collm/tokenizers``, by the content of the files.

    Raises:
        CheckpointError: there is no tokenizer, or it cannot be converted.
    """
    if (directory / TOKENIZER).is_file():
        return directory
    sources = [file for file in sorted(directory.glob("*")) if file.suffix in {".json", ".model", ".txt", ".jinja"}]
    if not any(file.name in SLOW_TOKENIZERS for file in sources):
        raise CheckpointError(f"{directory} has no tokenizer.json, nor files that one can be made of")
    digest = hashlib.sha256()
    for file in sources:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "collm" / "tokenizers"
    converted = cache / digest.hexdigest()[:32]
    if not (converted / TOKENIZER).is_file():
        _convert_tokenizer(directory, converted)
    return converted


def _convert_tokenizer(directory: Path, out: Path) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
            tokenizer.save_pretrained(temporary)
            if not (Path(temporary) / TOKENIZER).is_file():
                raise ValueError(f"{type(tokenizer).__name__} has no fast variant")
            try:
                Path(temporary).rename(out)
            except OSError:
                if not (out / TOKENIZER).is_file():  # else another process was faster
                    raise
    except Exception as error:  # of many libraries; all mean the same here
        message = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{directory}: its tokenizer cannot be converted: {message[:300]}") from error


def make_readable(folder: Path, like: str = CONFIG) -> None:
    """Let those read a folder's weights who may read its file ``like``: safetensors makes them their owner's alone."""
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / like, file)


def copy_companions(source: Path, out: Path, *, without: tuple[str, ...] = ()) -> None:
    """Copy what lies beside weights and config.json: tokenizer, chat template and generation settings."""
    for file in sorted(source.iterdir()):
        is_text = file.suffix in {".json", ".jinja", ".model", ".txt"}
        if is_text and not file.name.endswith(".index.json") and file.name not in (CONFIG, *without):
            shutil.copyfile(file, out / file.name)


def _text_config(directory: Path, overrides: Mapping[str, Any], read: ConfigReader) -> dict[str, Any]:
    """The language model's part of a configuration, defaults included and under transformers' common names."""
    try:
        text = read(directory, overrides).get_text_config()
    except Exception as error:  # transformers raises many kinds for a config.json that it cannot make anything of
        message = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{directory / CONFIG}: {message[:300]}") from error
    names = ("vocab_size", "hidden_size", "word_embed_proj_dim")
    return {name: getattr(text, name) for name in names if getattr(text, name, None) is not None}


def read_with_transformers(directory: Path, overrides: Mapping[str, Any]) -> Any:
    """The configuration as transformers reads it."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(directory), local_files_only=True, **overrides)
