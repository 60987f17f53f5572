"""One module per group of routes. A route validates, turns text into token ids, and hands over to server.stream."""

from __future__ import annotations

from fastapi import Request

from server.service import Service


def service_of(request: Request) -> Service:
    """The application's service."""
    service: Service = request.app.state.service
    return service
