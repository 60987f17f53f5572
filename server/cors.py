"""Which pages may call the server from a browser."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from server.asgi import error_response
from server.errors import ApiError


class Cors(CORSMiddleware):
    """Starlette's CORS, whose refusals are error objects like all others."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """The answer to a browser that asks whether a page may send what it is about to send."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        reason = bytes(response.body).decode()
        # Those of a browser's concern; what describes the text that is replaced is not among them.
        headers = {
            name: value for name, value in response.headers.items() if name not in ("content-type", "content-length")
        }
        return error_response(ApiError(response.status_code, f"{reason}.", code="cors_refused", headers=headers))
