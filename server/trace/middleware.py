"""A span for every generation request.

opentelemetry-instrumentation-asgi makes such a span too, and is not used: it traces every request, probes and /metrics
included, unless their addresses are excluded one by one; it adds a span per message, that is per token of a stream; its
releases are all betas; and what is left here would be needed all the same, since a choice's spans hang on this one.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.asgi import route_path
from server.disconnect import ClientGone
from server.trace.spans import OPERATIONS, Traces


class TraceRequests:
    """Middleware: gives a generation request that is sampled its trace, as ``scope["trace"]``.

    It stands inside of what gives requests their ids.
    """

    def __init__(self, app: ASGIApp, traces: Traces) -> None:
        self._app = app
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        traced = scope["type"] == "http" and scope["method"] == "POST" and (route := route_path(scope)) in OPERATIONS
        trace = self._traces.begin(scope, route) if traced else None
        if trace is None:
            await self._app(scope, receive, send)
            return
        scope["trace"] = trace

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                trace.responded(message)
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        except (ClientGone, asyncio.CancelledError):
            trace.outcomes.append("aborted")
            raise
        except Exception as error:
            trace.fail(type(error).__qualname__)
            raise
        finally:
            trace.end()
