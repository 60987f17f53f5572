"""The access log: one line for each response, with what its answer took; and logs as JSON."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import msgspec
from starlette.types import Scope

from server.auth import client_of
from server.usage import UsageCounter

logger = logging.getLogger("collm.access")

_PROBES = frozenset({"/health", "/ready", "/metrics"})
"""Asked all the time by machines: logged at debug where they were answered well."""


@dataclass(slots=True)
class Account:
    """What a generation request took; in the ASGI scope as ``account``.

    Attributes:
        model: that was asked for; known to be served.
        usage: tokens so far.
        error: code of the error that ended a stream after its headers.
    """

    model: str
    usage: UsageCounter | None = None
    error: str | None = None


def log_response(scope: Scope, status: str, seconds: float) -> None:
    """Log a response that has ended.

    Args:
        status: 499 where the client left before it began.
        seconds: from the request to the response's last byte.
    """
    path = quote(scope["path"])
    level = logging.DEBUG if path in _PROBES and status == "200" else logging.INFO
    if not logger.isEnabledFor(level):
        return
    fields: dict[str, Any] = {
        "request_id": scope["request_id"],
        "client": client_of(scope),
        "method": scope["method"],
        "path": path,
        "status": int(status),
        "seconds": round(seconds, 4),
    }
    account: Account | None = scope.get("account")
    if account is not None:
        fields["model"] = account.model
        if account.usage is not None:
            usage = account.usage.usage()
            details = usage.completion_tokens_details
            fields["prompt_tokens"] = usage.prompt_tokens
            fields["completion_tokens"] = usage.completion_tokens
            fields["expert_tokens"] = details.expert_tokens
            if details.blended_tokens is not msgspec.UNSET:
                fields["blended_tokens"] = details.blended_tokens
            fields["queue_seconds"] = round(usage.collaboration.queue_seconds, 4)
        if account.error is not None:
            fields["error"] = account.error
    logger.log(level, " ".join(f"{name}={_word(value)}" for name, value in fields.items()), extra={"fields": fields})


def _word(value: object) -> str:
    text = str(value)
    return text if " " not in text else f'"{text}"'


class JsonFormatter(logging.Formatter):
    """A log record as a line of JSON: ``time`` (UTC), ``level``, ``logger``, and ``message`` or the record's fields."""

    def format(self, record: logging.LogRecord) -> str:
        """See :class:`logging.Formatter`."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
        }
        fields = getattr(record, "fields", None)
        line |= {"message": record.getMessage()} if fields is None else fields
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()
