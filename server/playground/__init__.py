"""The pages for people: the playground at / and the API reference at /docs, static files without outside resources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

STATIC = Path(__file__).parent / "static"
"""index.html is served at /, docs.html at /docs, everything in here under /static."""

HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Of the pages and their files: nothing but this server's own is loaded, nobody else is called, and a browser asks each
time whether a file is still the same, so that those of two versions never meet."""


class _Files(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        return response


def is_page(path: str) -> bool:
    """Whether a path belongs to the pages: what is served there is the same for everybody."""
    return path in ("/", "/docs") or path.startswith("/static/")


def mount_playground(app: FastAPI) -> None:
    """Serve the pages. A build without them answers / with 404, like any other path that does not exist."""
    if not (STATIC / "index.html").is_file():
        return

    @app.get("/", include_in_schema=False)
    async def playground() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers=HEADERS)

    @app.get("/docs", include_in_schema=False)
    async def reference() -> FileResponse:
        return FileResponse(STATIC / "docs.html", headers=HEADERS)

    app.mount("/static", _Files(directory=STATIC), name="static")
