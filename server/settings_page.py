"""docs/configuration.md, made from the settings models: ``python -m server.settings_page > docs/configuration.md``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from engine.config import LaneConfig
from server.settings import Settings

HEAD = """\
# Configuration

<!-- Made by `python -m server.settings_page > docs/configuration.md` from the settings models; do not edit. -->

What people change most:

| option | why |
| --- | --- |
| `base.model`, `experts.model` | your own pair |
| `gate.path` | the trained gate; without one the base's confidence decides |
| `gate.threshold` | how much the experts write, unless a request says so: lower is more |
| `served_model_name` | what clients put into `model` |
| `server.host`, `server.port` | `0.0.0.0` lets other machines in |
| `server.api_keys_file` | who may ask |
| `scheduler.max_num_seqs` | requests in the lanes at once |
| `base.vllm`, `experts.vllm` | vLLM's own options of a lane, such as `max_model_len`, `dtype`, `quantization` |
| `base.kv_cache_memory_bytes`, `experts.kv_cache_memory_bytes` | memory for the KV cache of a lane |
| `base.devices`, `experts.devices` | which GPUs a lane has (with `executor = "mp"`) |
| `server.max_queued_requests` | how many may wait before clients get 429 |

## How to set an option

Every option can stand in three places. Where it stands in more than one, the first of these counts:

1. the command line: `--server.port 9000` (`--host` and `--port` are short for `--server.host` and `--server.port`);
2. the environment: `COLLM_SERVER__PORT=9000`, that is `COLLM_`, then the option in capitals with `__` for the dot;
3. the TOML file that `--config FILE` (or `COLLM_CONFIG`) names.

```toml
[server]
port = 9000
```

An option that does not exist is an error on the command line and in the file. In the environment it is not looked at,
since `COLLM_URL` and `COLLM_API_KEY` are the [command line](cli.md)'s. A list is given to the command line and the
environment as JSON: `--experts '[{"name": "codes", "model": "models/demo/codes"}]'`. Yes-or-no options have two flags
on the command line: `--server.access_log` and `--no-server.access_log`. Files to begin with are in `deploy/config/`.
Relative paths in a file count from its folder, others from the folder that the server is started in.
`collm serve --help` lists the same options.
"""


def page() -> str:
    """The whole page."""
    plain: list[tuple[str, FieldInfo]] = []
    sections: list[str] = []
    for name, field in Settings.model_fields.items():
        model, heading = _model_of(field)
        if model is None:
            plain.append((name, field))
            continue
        fields = list(model.model_fields.items())
        about = " ".join((model.__doc__ or "").split())
        if name != "base" and issubclass(model, LaneConfig):
            fields = [(each, found) for each, found in fields if each not in LaneConfig.model_fields]
            about += " Beside these, it has every option of `[base]`."
        sections.append(f"## `{heading.format(name)}`\n\n{about}\n\n{_table(model, fields)}")
    top = "## Top level\n\n" + _table(Settings, plain)
    return "\n".join([HEAD, top, *sections])


def _table(model: type[BaseModel], fields: list[tuple[str, FieldInfo]]) -> str:
    schema = model.model_json_schema()
    lines = ["| option | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in fields:
        described = schema["properties"][name]
        default = "required" if field.is_required() else _default(field)
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        lines.append(f"| `{name}` | {_kind(described, schema)} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None:
        return ""
    if isinstance(value, bool | str | int | float):
        return f"`{json.dumps(value)}`"
    return "none" if not value else f"`{value}`"


def _kind(described: dict[str, Any], schema: dict[str, Any]) -> str:
    """``integer, 1 to 64``; choices as they are written."""
    if "$ref" in described:
        described = schema["$defs"][described["$ref"].rpartition("/")[2]]
    if "anyOf" in described:
        kinds = (_kind(each, schema) for each in described["anyOf"] if each.get("type") != "null")
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in described:
        return ", ".join(f"`{json.dumps(value)}`" for value in described["enum"])
    kind = {"object": "table", "array": "list"}.get(str(described.get("type")), str(described.get("type")))
    if described.get("format") in ("path", "file-path"):
        kind = "path"
    if kind == "list" and isinstance(items := described.get("items"), dict):
        kind = f"list of {_kind(items, schema)}"
    return ", ".join([kind, *_bounds(described)])


def _bounds(described: dict[str, Any]) -> Iterator[str]:
    low, high = described.get("minimum"), described.get("maximum")
    if low is not None and high is not None:
        yield f"{low:g} to {high:g}"
    elif low is not None:
        yield f"at least {low:g}"
    elif high is not None:
        yield f"at most {high:g}"
    if (above := described.get("exclusiveMinimum")) is not None:
        yield f"more than {above:g}"


def _model_of(field: FieldInfo) -> tuple[type[BaseModel] | None, str]:
    """The model of a section, and the form of its heading."""
    annotation = field.annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, "[{}]"
    for inner in get_args(annotation):
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            return inner, "[{}.NAME]" if get_origin(annotation) is dict else "[[{}]]"
    return None, ""


if __name__ == "__main__":
    print(page(), end="")
