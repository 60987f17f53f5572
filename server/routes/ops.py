"""Routes for those who run the server: /health, /ready, /version, /metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from server import __version__
from server.errors import ApiError
from server.metrics import CONTENT_TYPE
from server.openapi import operation
from server.protocol.responses import HealthResponse, VersionResponse, encode
from server.service import service_of

router = APIRouter(tags=["operations"])


@router.get("/health", **operation(None, HealthResponse, (503,)))
async def health(request: Request) -> Response:
    """200 while process and engine live (also while they load or drain), for a liveness probe."""
    service = service_of(request)
    engine = service.started_engine
    if service.phase == "dead" or (engine is not None and not engine.alive):
        raise ApiError(503, "The engine is dead.", code="engine_dead", headers={"Retry-After": "1"})
    return _json(HealthResponse("ok"))


@router.get("/ready", **operation(None, HealthResponse, (503,)))
async def ready(request: Request) -> Response:
    """200 only while requests are admitted, for a readiness probe."""
    service_of(request).ready_engine()
    return _json(HealthResponse("ready"))


@router.get("/version", **operation(None, VersionResponse, (401,)))
async def version(request: Request) -> Response:
    """Versions of the server and, once it runs, of what the engine is made of; and the token ids that end a text."""
    engine = service_of(request).started_engine
    if engine is None:
        return _json(VersionResponse(__version__, {}))
    return _json(
        VersionResponse(__version__, engine.info.versions, engine.info.eos_token_ids, engine.info.vocabularies)
    )


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"description": "Prometheus text format.", "content": {"text/plain": {}}}},
)
async def metrics(request: Request) -> Response:
    """Metrics, in Prometheus' format."""
    service = service_of(request)
    service.set_load()
    return Response(service.metrics.render(), media_type=CONTENT_TYPE)


def _json(body: HealthResponse | VersionResponse) -> Response:
    return Response(encode(body), media_type="application/json")
