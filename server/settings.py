"""The server's configuration: command line > environment (COLLM_...) > the TOML file that --config names."""

from __future__ import annotations

import os
import tomllib
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from engine.config import EngineConfig, ExpertConfig, GateConfig, LaneConfig, SchedulerConfig
from engine.second_look import CHECK_BELOW
from server.blends import BlendPreset, BlendTable


class ConfigFileError(Exception):
    """The file of --config cannot be read. The message is one line."""


class ServerConfig(BaseModel):
    """The HTTP side."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every IPv4 address of the machine."""

    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 picks a free one."""

    root_path: str = Field(default="", pattern=r"^(/[^/?#]+)*$")
    """Path prefix under which a proxy serves this server, e.g. /llm, where the proxy strips it."""

    api_keys: tuple[SecretStr, ...] = ()
    """Keys of which a client must send one (Authorization: Bearer KEY). None: no key is needed. Better set by
    environment or file than on the command line, where others can see it."""

    api_keys_file: Path | None = None
    """File with further keys, one per line; empty lines and lines that begin with # don't count."""

    playground: Literal["key", "open", "off"] = "open"
    """The pages for people (/, /docs and their files under /static) where there are API keys: "open" serves them to
    everybody, since they hold nothing secret, and they ask for the key that their requests need; "key" asks for one,
    as every route does, which a browser's address bar cannot send. "off": there are no pages."""

    cors_allow_origins: tuple[str, ...] = ()
    """Origins whose pages may call this server from a browser; "*" is any. None: no CORS headers."""

    tls_certificate: Path | None = None
    """Certificate (chain) in PEM format; with tls_key, serves HTTPS."""

    tls_key: Path | None = None
    """The certificate's private key in PEM format."""

    max_queued_requests: int = Field(default=1024, ge=0)
    """Generation requests (one per choice) that may wait for a place in the lanes; more are answered 429."""

    queue_reserve: float = Field(default=0.25, ge=0, le=1)
    """Share of max_queued_requests that is kept on top of it for the other clients when one has filled the queue: a
    client (an API key, else an address) may use it for as long as it holds no more places than are left free. 0: one
    client can keep all others out."""

    max_queued_tokenize_requests: int = Field(default=32, ge=0)
    """Requests to /tokenize and /detokenize that may wait for the one before them; more are answered 429. Here too
    there is a reserve for the other clients."""

    check_below: float = Field(default=CHECK_BELOW, ge=0, le=1)
    """Reports mark a token for a second look ("check") where the confidence of who wrote it is below this."""

    max_stop_strings: int = Field(default=16, ge=4, le=256)
    """Most stop strings of a request; OpenAI allows 4, evaluation harnesses send more."""

    max_body_bytes: int = Field(default=4 * 1024 * 1024, ge=1024)
    """Largest request body."""

    max_header_bytes: int = Field(default=32 * 1024, ge=1024)
    """Largest request head: request line and headers together."""

    max_headers: int = Field(default=100, ge=10)
    """Most headers of a request."""

    header_timeout_s: float = Field(default=10.0, gt=0)
    """Seconds for a request's head to arrive."""

    body_timeout_s: float = Field(default=30.0, gt=0)
    """Seconds for a request's body to arrive."""

    write_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds after which a client that reads nothing of its response is disconnected."""

    keep_alive_s: int = Field(default=75, ge=1)
    """Seconds an idle connection is kept; make it longer than the load balancer's."""

    drain_timeout_s: int = Field(default=300, ge=0)
    """Seconds that requests in flight get to finish after SIGTERM."""

    retry_after_s: int = Field(default=1, ge=1)
    """Retry-After of 503 responses, and the minimum for 429, where it is estimated from recent throughput and capped at
    60 s."""

    on_engine_death: Literal["exit", "restart"] = "exit"
    """When the engine dies: "exit" ends the server with a non-zero status, for a supervisor to restart it; "restart"
    starts another engine in its place."""

    prompt_scores: Literal["base", "joint"] = "base"
    """Whose log-probabilities of a prompt (echo with logprobs, prompt_logprobs) the joint model and blends return where
    a request does not say, see collaboration.score. "joint" lets an evaluation harness, which cannot say, measure the
    pair by multiple choice; what the joint model cannot score is refused then unless a request says "base"."""

    special_tokens_in_messages: Literal["text", "token"] = "text"
    """What a special token's name in a chat message is: "text", so that no message can end itself or begin another one;
    "token" for conversations that bring special tokens of their own. Those of the chat template are tokens always."""

    chat_templates: Literal["base", "own"] = "base"
    """By whose chat template members of one vocabulary read a conversation: the base's for all, as the gate was trained
    with, or "own": each by the one that comes with its tokenizer, if one does, else by the base's. Members that have
    vocabularies of their own always read it by their own."""

    tokenizer_threads: int = Field(default=2, ge=1, le=64)
    """Threads that tokenise prompts."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe messages to log."""

    log_format: Literal["text", "json"] = "text"
    """How to log: lines of text, or one JSON object per line."""

    access_log: bool = True
    """Log one line for each response: request id, client, path, status, seconds, and of generated answers the model and
    the tokens."""

    vllm_metric_names: bool = False
    """Export three gauges under vLLM's names too: vllm:num_requests_running, vllm:num_requests_waiting and
    vllm:kv_cache_usage_perc, which endpoint pickers of inference gateways read."""

    otlp_endpoint: str | None = Field(default=None, pattern=r"^https?://[^\s/]\S*$")
    """Collector of OpenTelemetry traces, e.g. http://collector:4318. Default: OTEL_EXPORTER_OTLP_ENDPOINT; without
    either, nothing is traced."""

    otlp_protocol: Literal["http/protobuf", "grpc"] | None = None
    """How to speak to it. Default: OTEL_EXPORTER_OTLP_PROTOCOL, else http/protobuf."""

    @field_validator("api_keys")
    @classmethod
    def _no_empty_key(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if any(not key.get_secret_value().strip() for key in keys):
            raise ValueError("a key is empty")
        return keys

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together")
        for name in ("tls_certificate", "tls_key"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise ValueError(f"{name}: there is no file {path}")
        return self

    @cached_property
    def all_keys(self) -> tuple[str, ...]:
        """All API keys, those of the file included. The file is read once.

        Raises:
            ConfigFileError: the file cannot be read, or has no key.
        """
        keys = [key.get_secret_value() for key in self.api_keys]
        if self.api_keys_file is not None:
            try:
                lines = [line.strip() for line in self.api_keys_file.read_text("utf-8").splitlines()]
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigFileError(f"server.api_keys_file: {self.api_keys_file}: {_reason(error)}") from None
            found = [line for line in lines if line and not line.startswith("#")]
            if not found:
                # An empty file would open the server to everybody, which is hardly what it is there for.
                raise ConfigFileError(f"server.api_keys_file: {self.api_keys_file} has no key")
            keys += found
        return tuple(keys)


class Settings(BaseSettings):
    """Serve a base model and its experts as one model, on an OpenAI-compatible API."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        env_prefix="COLLM_",
        env_nested_delimiter="__",
        nested_model_default_partial_update=True,
        cli_prog_name="collm serve",
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_implicit_flags=True,
        cli_exit_on_error=False,
        cli_shortcuts={"server.host": "host", "server.port": "port"},
    )

    config: Path | None = None
    """TOML file with any of these options, under the same names. Paths in it count from its folder."""

    served_model_name: str = Field(default="collm", pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$")
    """Name of the joint model; its members are served as NAME/base and NAME/EXPERT."""

    example_prompt: str | None = Field(default=None, min_length=1)
    """A question that this pair answers well, for the command that is printed when the server is ready. With a chat
    template it is a user's message, else the beginning of a text."""

    tokenizer: str | None = None
    """Folder with the tokenizer.json that all models share. Default: the base model's."""

    base: LaneConfig
    experts: tuple[ExpertConfig, ...] = ()
    """Domain experts, as a JSON list: [{"name": ..., "model": ...}]."""

    blends: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")], BlendPreset] = Field(
        default_factory=dict
    )
    """Blends by name, which requests may ask for, and which models of a name of their own have by default."""

    gate: GateConfig = GateConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    server: ServerConfig = ServerConfig()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Most important first; the command line goes before all of them."""
        return init_settings, env_settings, _TomlFile(settings_cls)

    @model_validator(mode="after")
    def _check(self) -> Self:
        # Raises what only the parts together can get wrong, such as two experts of one name.
        engine = self.engine
        BlendTable(
            self.blends, engine.lane_names, engine.blend_obstacle, guidance=self.scheduler.guidance
        ).check_presets(list(self.blends))
        names = [name for preset in self.blends.values() if (name := preset.served_model_name) is not None]
        taken = [self.served_model_name, *(f"{self.served_model_name}/{name}" for name in engine.lane_names)]
        for name in names:
            if name in taken or names.count(name) > 1:
                raise ValueError(f"blends: served_model_name {name!r} is taken")
        return self

    @cached_property
    def engine(self) -> EngineConfig:
        """What the engine has to know."""
        return EngineConfig(base=self.base, experts=self.experts, gate=self.gate, scheduler=self.scheduler)

    @property
    def tokenizer_location(self) -> str:
        """Where the tokenizer is."""
        return self.tokenizer or self.base.model


class _TomlFile(PydanticBaseSettingsSource):
    """The file that ``config`` names, in whatever source that stands."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Not used: the file is taken whole."""
        raise NotImplementedError

    def __call__(self) -> dict[str, Any]:
        path = self.current_state.get("config")
        if path is None:
            return {}
        try:
            values = tomllib.loads(Path(path).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigFileError(f"{path}: {_reason(error)}") from None
        if "config" in values:
            raise ConfigFileError(f"{path}: 'config' cannot stand in the file itself")
        _resolve_paths(values, Path(path).absolute().parent)
        return values


_PATHS = (("tokenizer",), ("base", "model"), ("base", "adapter"), ("gate", "path"), ("server", "api_keys_file"))
"""Settings that name a file or folder, by table and name; beside them the model and adapter of each expert."""


def _resolve_paths(values: dict[str, Any], folder: Path) -> None:
    """Let relative paths count from the folder of the file that they stand in.

    What is not there stays as it is: the name of a model on a hub, or a path from the working folder. Only what can be
    neither becomes a whole path, so that an error says where it was looked for.
    """
    experts = values.get("experts")
    listed = experts if isinstance(experts, list) else []
    named = [(expert, name) for expert in listed for name in ("model", "adapter")]
    for *tables, name in _PATHS:
        table: Any = values
        for key in tables:
            table = table.get(key) if isinstance(table, dict) else None
        named.append((table, name))
    for table, name in named:
        value = table.get(name) if isinstance(table, dict) else None
        if not isinstance(value, str):
            continue
        found = folder / value
        if found.exists() or (value.startswith(("./", "../")) and not Path(value).exists()):
            table[name] = os.path.normpath(found)


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
